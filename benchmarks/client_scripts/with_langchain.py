"""langchain-openai: its classes OpenAI (completions) and ChatOpenAI."""

from typing import Any

from calls import MODEL, PROMPT, PROMPTS, URL, counted, report, same, without
from langchain_openai import ChatOpenAI, OpenAI


def model(**more: Any) -> Any:
    return OpenAI(base_url=URL, api_key="none", model=MODEL, max_retries=0, **more)


def chat() -> Any:
    return ChatOpenAI(base_url=URL, api_key="none", model=MODEL, max_retries=0)


report(
    {
        "default": lambda: model().invoke(PROMPT),
        "long": lambda: model(max_tokens=4096).invoke(PROMPT),
        "stream": lambda: list(model().stream(PROMPT)),
        "prompts": lambda: counted(3, model().batch(PROMPTS)),
        "many prompts": lambda: counted(60, model().generate(PROMPTS * 20).generations),
        "stop": lambda: without("e", model().invoke(PROMPT, stop=["e"])),
        "logprobs": lambda: (
            model(logprobs=2).generate([PROMPT]).generations[0][0].generation_info["logprobs"]
        ),
        "seed": lambda: same(model(seed=7).invoke(PROMPT), model(seed=7).invoke(PROMPT)),
        "n": lambda: counted(2, model(n=2, best_of=2).generate([PROMPT]).generations[0]),
        "chat": lambda: chat().invoke(PROMPT).content,
        "chat stream": lambda: [part.content for part in chat().stream(PROMPT)],
    }
)
