"""An example prompt that suits a model, in the model's folder: `gptray.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from gptray.storage.files import replacing
from gptray.storage.stored import Unreadable, read_object

EXAMPLE = "gptray.json"
KEY, PARSED = "example_prompt", "parse_special"
# The prompt for a model without an example.
FALLBACK = "Once upon a time"
# `save_example` writes no longer one.
MAX_CHARACTERS = 1000


class Example(NamedTuple):
    """A prompt, and whether it names special tokens, so that sample.parse_special suits it."""

    prompt: str
    parse_special: bool = False


def save_example(folder: Path, prompt: str, *, parse_special: bool = False) -> None:
    """Write the prompt to a model folder; Hugging Face's loaders ignore the file."""
    example = {KEY: prompt, **({PARSED: True} if parse_special else {})}
    with replacing(folder / EXAMPLE) as draft:
        draft.write_text(json.dumps(example, ensure_ascii=False) + "\n", "utf-8")


def load_example(folder: Path) -> Example | None:
    """The prompt in a model folder; None if there is none or it cannot be read."""
    try:
        stored = read_object(folder / EXAMPLE)
    except (OSError, Unreadable):
        return None
    prompt = stored.get(KEY)
    if not isinstance(prompt, str) or not 0 < len(prompt) <= MAX_CHARACTERS:
        return None
    return Example(prompt, stored.get(PARSED) is True)
