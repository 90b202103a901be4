"""What a tokenizer puts before a text, such as <s>: it stands in tokenizer.json's post-processor.

What it would put behind one is left out: a prompt is there to be continued, and a document that is
trained on ends with the end of text anyway.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache

import tokenizers

from gptray.config import UserError
from gptray.data.tokenizer_files import open_tokenizer


def text_prefix(backend: tokenizers.Tokenizer) -> list[int]:
    """The ids that come before those of any text where special tokens are added; often none."""
    if backend.post_processor is None:
        return []
    state = backend.post_processor.__getstate__()
    assert isinstance(state, bytes)
    return _before(json.loads(state))


@lru_cache(maxsize=16)
def stored_prefix(source: str, sha256: str) -> list[int]:
    """The same of a tokenizer on disk, see `open_tokenizer`. sha256: tells changed files apart."""
    backend, _ = open_tokenizer(source)
    return text_prefix(backend)


def check_prefix(prefix: list[int], vocab_size: int, source: str) -> None:
    """Raise UserError where it holds an id that no token has."""
    for number in prefix:
        if number >= vocab_size:
            raise UserError(
                f"data.tokenizer={source}: it puts token {number:,} before every text, but has "
                f"only {vocab_size:,} tokens"
            )


def _before(step: Mapping[str, object]) -> list[int]:
    """What a post-processor puts before a text; of several, each does so in turn."""
    match step:
        case {"type": "Sequence", "processors": list(steps)}:
            return [number for one in reversed(steps) for number in _before(one)]
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [_, int(number)]}:
            return [number]
        case {"type": "TemplateProcessing", "single": list(pieces), "special_tokens": tokens}:
            assert isinstance(tokens, dict)
            found: list[int] = []
            for piece in pieces:
                if "SpecialToken" not in piece:
                    break
                found += tokens[piece["SpecialToken"]["id"]]["ids"]
            return found
    return []
