"""A prompt that suits a model, kept in the model's folder: `gptray.json`."""

from __future__ import annotations

import json
from pathlib import Path

from gptray.files import replacing
from gptray.stored import Unreadable, read_object

EXAMPLE = "gptray.json"
KEY = "example_prompt"
# The prompt for a model without one of its own.
FALLBACK = "Once upon a time"
# A longer one was not written by `save_example`.
MOST_CHARACTERS = 1000


def save_example(folder: Path, prompt: str) -> None:
    """Keep the prompt in a model folder; Hugging Face's loaders ignore the file."""
    with replacing(folder / EXAMPLE) as draft:
        draft.write_text(json.dumps({KEY: prompt}, ensure_ascii=False) + "\n", "utf-8")


def load_example(folder: Path) -> str | None:
    """The prompt of a model folder; None if there is none, or none that can be read."""
    try:
        prompt = read_object(folder / EXAMPLE).get(KEY)
    except (OSError, Unreadable):
        return None
    return prompt if isinstance(prompt, str) and 0 < len(prompt) <= MOST_CHARACTERS else None
