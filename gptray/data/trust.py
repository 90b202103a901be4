"""What a tokenizer from elsewhere must not do: grow text without end, number tokens into the void.

Such a file is well-formed, and a process that opened it would only find out by its memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import tokenizers

# Normalizers of real tokenizers make up to 18 characters (NFKC) of one.
_MAX_GROWTH = 64
# Ids may have gaps: reserved tokens, tokens added from a round number on.
_MAX_IDS_PER_TOKEN, _MAX_SPARE_IDS = 4, 1 << 16


@contextmanager
def panics_told() -> Iterator[None]:
    """Raise a panic of the tokenizers library as a ValueError: as it comes, it is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library gave up: {error}") from None


def check_growth(parts: Mapping[str, Any]) -> None:
    """Refuse a tokenizer.json that makes one character into very many. Raises ValueError."""
    for name in ("normalizer", "decoder"):
        growth = _growth(parts.get(name))
        if growth > _MAX_GROWTH:
            raise ValueError(
                f"its {name} makes up to {growth:,} characters of one; {_MAX_GROWTH} are allowed"
            )


def _growth(part: Any) -> int:
    """How many characters a normalizer or decoder makes of one by replacing text."""
    if not isinstance(part, dict):
        return 1
    growth = 1
    for key in ("normalizers", "decoders"):
        for inner in part.get(key) or ():
            growth = min(growth * _growth(inner), 10**12)
    if part.get("type") == "Replace":
        text = part.get("pattern", {}).get("String") or " "  # a Regex may match one character
        growth *= max(1, -(-len(part.get("content", "")) // len(text)))
    return growth


def check_vocabulary(backend: tokenizers.Tokenizer) -> None:
    """Refuse token ids far beyond the number of tokens. Raises ValueError."""
    vocab = backend.get_vocab(with_added_tokens=True)
    if not vocab:
        raise ValueError("its vocabulary is empty")
    name = max(vocab, key=vocab.__getitem__)
    if vocab[name] > _MAX_IDS_PER_TOKEN * len(vocab) + _MAX_SPARE_IDS:
        raise ValueError(f"the token {name!r:.60} has id {vocab[name]:,}, of {len(vocab):,} tokens")
