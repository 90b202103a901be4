"""An example prompt that suits a model, in the model's folder: `gptray.json`."""

from __future__ import annotations

import json
from pathlib import Path

from gptray.files import replacing
from gptray.stored import Unreadable, read_object

EXAMPLE = "gptray.json"
KEY = "example_prompt"
# The prompt for a model without an example.
FALLBACK = "Once upon a time"
# `save_example` writes no longer one.
MAX_CHARACTERS = 1000


def save_example(folder: Path, prompt: str) -> None:
    """Write the prompt to a model folder; Hugging Face's loaders ignore the file."""
    with replacing(folder / EXAMPLE) as draft:
        draft.write_text(json.dumps({KEY: prompt}, ensure_ascii=False) + "\n", "utf-8")


def load_example(folder: Path) -> str | None:
    """The prompt in a model folder; None if there is none or it cannot be read."""
    try:
        prompt = read_object(folder / EXAMPLE).get(KEY)
    except (OSError, Unreadable):
        return None
    return prompt if isinstance(prompt, str) and 0 < len(prompt) <= MAX_CHARACTERS else None
