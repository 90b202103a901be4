"""llm: a model of extra-openai-models.yaml with `completion: true`."""

import os
import tempfile
from pathlib import Path
from typing import Any

from calls import MODEL, PROMPT, PROMPTS, URL, counted, report, same, without

ENTRY = "- model_id: {0}\n  model_name: {1}\n  api_base: {2}\n  completion: {3}\n"
folder = tempfile.TemporaryDirectory()
os.environ["LLM_USER_PATH"] = folder.name
Path(folder.name, "extra-openai-models.yaml").write_text(
    ENTRY.format("here", MODEL, URL, "true") + ENTRY.format("chat", MODEL, URL, "false"), "utf-8"
)

import llm  # noqa: E402


def prompt(text: str = PROMPT, *, name: str = "here", stream: bool = False, **more: Any) -> Any:
    return llm.get_model(name).prompt(text, stream=stream, key="none", **more)


report(
    {
        "default": lambda: prompt().text(),
        "long": lambda: prompt(max_tokens=4096).text(),
        "stream": lambda: list(prompt(stream=True)),
        "prompts": lambda: counted(3, [prompt(text).text() for text in PROMPTS]),
        "stop": lambda: without("e", prompt(stop="e").text()),
        "logprobs": lambda: prompt(logprobs=2).text(),
        "seed": lambda: same(prompt(seed=7).text(), prompt(seed=7).text()),
        "chat": lambda: prompt(name="chat").text(),
    }
)
