"""How well a tokenizer fits a text: bytes and tokens per character, and the share of fallbacks.

A fallback token is part of a character, or an unknown one. Many of them mean that the
vocabulary was made for other text, or is too small for this one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gptray.data.data_manifest import DataManifest
from gptray.data.difference import percent
from gptray.data.roundtrip import RoundTrip, is_byte_token, pieces
from gptray.data.tokenizer import Tokenizer

# The share from which a model spends much of its context on spelling.
HIGH = 0.1


def fallback_tokens(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Whether each token, by id, is part of a character or unknown."""
    names, unknown = tokenizer.names, RoundTrip(tokenizer).unknown
    return np.array(
        [
            name == unknown
            or is_byte_token(name)
            or piece.decode(errors="ignore").encode() != piece
            for name, piece in zip(names, pieces(tokenizer), strict=True)
        ]
    )


def token_measures(manifest: DataManifest) -> dict[str, float]:
    """Measures over all splits; empty for data that was prepared without counting.

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


def token_words(manifest: DataManifest) -> str:
    """The measures in words; "" if nothing was counted."""
    found = token_measures(manifest)
    if not found:
        return ""
    words = (
        f"{found['bytes_per_token']:.2f} bytes each, {found['tokens_per_character']:.2f} per "
        "character"
    )
    if found["fallback"]:
        words += f"; {percent(found['fallback'])} are parts of characters or unknown"
    return words


def fallback_warning(manifest: DataManifest, *, asked: int | None) -> str | None:
    """A warning if many tokens are fallbacks; None if few.

    asked: data.vocab_size, if the tokenizer was trained on this text.
    """
    share = token_measures(manifest).get("fallback", 0.0)
    if share < HIGH:
        return None
    size = manifest["tokenizer"]["vocab_size"]
    remedy = "data.tokenizer=bpe trains one on this text"
    if manifest.get("chats"):  # one trained here has no chat template
        remedy = "choose a model whose tokenizer suits it"
    if asked is not None:
        remedy = f"raise data.vocab_size from {size}, for example to {4 * size}"
        if size < asked:
            remedy = f"the text is too short for data.vocab_size={asked}, only for {size}"
    return (
        f"{percent(share)} of the tokens are parts of characters or unknown: the vocabulary has "
        f"too few of this text's characters; {remedy}"
    )
