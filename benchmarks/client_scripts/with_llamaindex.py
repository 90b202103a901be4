"""llama-index-llms-openai-like: OpenAILike, with and without chat."""

from typing import Any

from calls import MODEL, PROMPT, PROMPTS, URL, counted, report, same, without
from llama_index.llms.openai_like import OpenAILike


def model(**more: Any) -> Any:
    return OpenAILike(model=MODEL, api_base=URL, api_key="none", max_retries=0, **more)


def chat(is_chat_model: bool) -> Any:
    from llama_index.core.llms import ChatMessage

    return model(is_chat_model=is_chat_model).chat([ChatMessage(role="user", content=PROMPT)])


report(
    {
        "default": lambda: model().complete(PROMPT).text,
        "long": lambda: model(max_tokens=4096).complete(PROMPT).text,
        "stream": lambda: [part.delta for part in model().stream_complete(PROMPT)],
        "prompts": lambda: counted(3, [model().complete(prompt).text for prompt in PROMPTS]),
        "stop": lambda: without("e", model().complete(PROMPT, stop=["e"]).text),
        "logprobs": lambda: model().complete(PROMPT, logprobs=2).raw.choices[0].logprobs,
        "seed": lambda: same(*(model().complete(PROMPT, seed=7).text for _ in "12")),
        "n": lambda: counted(2, model().complete(PROMPT, n=2).raw.choices),
        "chat by text": lambda: chat(False).message.content,
        "chat": lambda: chat(True).message.content,
    }
)
