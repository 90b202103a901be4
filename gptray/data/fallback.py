"""How finely a tokenizer cuts a text: bytes and characters per token, and how much it spells out.

A token that stands for part of a character, or for one that the tokenizer does not know, says that
the vocabulary was made for other text, or is too small for this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptray.data.difference import percent
from gptray.data.roundtrip import RoundTrip, is_byte_token, pieces
from gptray.data.tokenizer import Tokenizer

# A share of such tokens from which on a model wastes much of its context on spelling.
HIGH = 0.1


def fallback_tokens(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Which tokens, by id, stand for a part of a character or for an unknown one."""
    names, unknown = tokenizer.names, RoundTrip(tokenizer).unknown
    return np.array(
        [
            name == unknown or is_byte_token(name) or _is_part(piece)
            for name, piece in zip(names, pieces(tokenizer), strict=True)
        ]
    )


def _is_part(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return True
    return False


def token_measures(manifest: Mapping[str, Any]) -> dict[str, float]:
    """What all splits come to; nothing for data that was prepared without counting.

    Keys: bytes_per_token, tokens_per_character, fallback (a share of the tokens).
    """
    splits = manifest["splits"].values()
    tokens = sum(split["tokens"] for split in splits)
    characters = sum(split.get("characters", 0) for split in splits)
    if not tokens or not characters:
        return {}
    return {
        "bytes_per_token": sum(split["bytes"] for split in splits) / tokens,
        "tokens_per_character": tokens / characters,
        "fallback": sum(split["fallback_tokens"] for split in splits) / tokens,
    }


def token_words(manifest: Mapping[str, Any]) -> str:
    """The same in words; "" where nothing was counted."""
    found = token_measures(manifest)
    if not found:
        return ""
    words = (
        f"{found['bytes_per_token']:.2f} bytes each, {found['tokens_per_character']:.2f} for each "
        "character"
    )
    if found["fallback"]:
        words += f"; {percent(found['fallback'])} are parts of characters or unknown"
    return words


def fallback_warning(manifest: Mapping[str, Any], *, asked: int | None) -> str | None:
    """What to raise where a text is mostly spelled out; `asked`: vocab_size, if trained on it."""
    share = token_measures(manifest).get("fallback", 0.0)
    if share < HIGH:
        return None
    size = manifest["tokenizer"]["vocab_size"]
    cure = "data.tokenizer=bpe trains one on this text"
    if asked is not None:
        cure = f"raise data.vocab_size from {size}, such as to {4 * size}"
        if size < asked:
            cure = f"it is too short to train more than {size} of data.vocab_size={asked}"
    return (
        f"{percent(share)} of the tokens stand for parts of characters or unknown ones: the "
        f"vocabulary has too few of this text's characters; {cure}"
    )
