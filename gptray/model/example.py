"""A prompt that suits a model, kept in its folder for whoever tries it: `gptray.json`."""

from __future__ import annotations

import json
from pathlib import Path

from gptray.files import replacing

EXAMPLE = "gptray.json"
KEY = "example_prompt"
# A longer one was not written here.
MOST_CHARACTERS = 1000


def save_example(folder: Path, prompt: str) -> None:
    """Keep the prompt in a model folder; Hugging Face's loaders do not look at the file."""
    with replacing(folder / EXAMPLE) as draft:
        draft.write_text(json.dumps({KEY: prompt}, ensure_ascii=False) + "\n", "utf-8")


def load_example(folder: Path) -> str | None:
    """The prompt of a model folder; None where there is none that can be read."""
    try:
        kept = json.loads((folder / EXAMPLE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    prompt = kept.get(KEY) if isinstance(kept, dict) else None
    return prompt if isinstance(prompt, str) and 0 < len(prompt) <= MOST_CHARACTERS else None
