"""litellm: the providers text-completion-openai and openai."""

from typing import Any

import litellm
from calls import MODEL, PROMPT, PROMPTS, URL, counted, report, same, without

litellm.suppress_debug_info = True
ENDPOINT: dict[str, Any] = {"api_base": URL, "api_key": "none", "num_retries": 0}


def complete(prompt: Any = PROMPT, **more: Any) -> Any:
    model = f"text-completion-openai/{MODEL}"
    return litellm.text_completion(model=model, prompt=prompt, **ENDPOINT, **more)


def stream(**more: Any) -> list[str]:
    chunks = complete(stream=True, **more)
    return [chunk.choices[0].text or "" for chunk in chunks if chunk.choices]


def chat(model: str) -> Any:
    messages = [{"role": "user", "content": PROMPT}]
    answer = litellm.completion(model=model, messages=messages, **ENDPOINT)
    return answer.choices[0].message.content


report(
    {
        "default": lambda: complete().choices[0].text,
        "long": lambda: complete(max_tokens=4096).choices[0].text,
        "stream": lambda: "".join(stream()),
        "usage": lambda: "".join(stream(stream_options={"include_usage": True})),
        "prompts": lambda: counted(3, complete(PROMPTS).choices),
        "stop": lambda: without("e", complete(stop="e").choices[0].text),
        "logprobs": lambda: complete(logprobs=2).choices[0].logprobs,
        "seed": lambda: same(complete(seed=7).choices[0].text, complete(seed=7).choices[0].text),
        "n": lambda: counted(2, complete(n=2).choices),
        "chat by text": lambda: chat(f"text-completion-openai/{MODEL}"),
        "chat": lambda: chat(f"openai/{MODEL}"),
    }
)
