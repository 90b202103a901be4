"""openai (PyPI)."""

from typing import Any

from calls import MODEL, PROMPT, PROMPTS, URL, counted, refused, report, same, without
from openai import OpenAI

client = OpenAI(base_url=URL, api_key="none", max_retries=0)
create = client.completions.create


def stream(**more: object) -> list[str]:
    return [
        chunk.choices[0].text if chunk.choices else f"usage {chunk.usage.total_tokens}"
        for chunk in create(model=MODEL, prompt=PROMPT, stream=True, **more)  # type: ignore
    ]


def chat(**more: object) -> Any:
    messages = [{"role": "user", "content": PROMPT}]
    return client.chat.completions.create(model=MODEL, messages=messages, **more)  # type: ignore


report(
    {
        "default": lambda: create(model=MODEL, prompt=PROMPT).choices[0].text,
        "long": lambda: create(model=MODEL, prompt=PROMPT, max_tokens=4096).choices[0].text,
        "stream": stream,
        "usage": lambda: stream(stream_options={"include_usage": True})[-1],
        "prompts": lambda: counted(3, create(model=MODEL, prompt=PROMPTS).choices),
        "stop": lambda: without("e", create(model=MODEL, prompt=PROMPT, stop="e").choices[0].text),
        "logprobs": lambda: create(model=MODEL, prompt=PROMPT, logprobs=2).choices[0].logprobs,
        "seed": lambda: same(*(create(model=MODEL, prompt=PROMPT, seed=7).choices for _ in "12")),
        "n": lambda: counted(2, create(model=MODEL, prompt=PROMPT, n=2).choices),
        "models": lambda: [model.id for model in client.models.list()],
        "chat": lambda: chat().choices[0].message.content,
        "chat stream": lambda: [chunk.choices[0].delta.content for chunk in chat(stream=True)],
        "responses": lambda: refused(lambda: client.responses.create(model=MODEL, input=PROMPT)),
        "embeddings": lambda: refused(lambda: client.embeddings.create(model=MODEL, input=PROMPT)),
    }
)
