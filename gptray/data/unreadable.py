"""Text that a tokenizer cannot encode, named by the piece that it does not know."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers

from gptray.config import UserError
from gptray.data.trust import panics_as_errors

_SHOWN = 40  # characters of the piece


class UnreadableText(UserError):
    """Text that a tokenizer cannot encode and has no unknown token for; it contains `piece`."""

    def __init__(self, message: str, piece: str) -> None:
        super().__init__(message)
        self.piece = piece

    def __reduce__(self) -> tuple[type[UnreadableText], tuple[str, str]]:
        return type(self), (str(self), self.piece)


def unreadable(
    backend: tokenizers.Tokenizer, texts: Sequence[str], error: Exception
) -> UnreadableText:
    """Find what the model, which has no unknown token, could not encode. error: as it raised."""
    text = next(text for text in texts if not _can_read(backend, text))
    words = (word for word in text.split() if not _can_read(backend, word))
    word = next(words, text)
    piece = next((one for one in word if not _can_read(backend, one)), word)
    kind = type(backend.model).__name__
    if kind == "WordLevel":
        piece = word
    return UnreadableText(
        f"the tokenizer ({kind}) does not know {piece[:_SHOWN]!r} and has no unknown token "
        f"({str(error).strip()}); give it one (unk_token), or choose data.tokenizer=bpe, which "
        "reads any text",
        piece,
    )


def _can_read(backend: tokenizers.Tokenizer, text: str) -> bool:
    try:
        with panics_as_errors():
            backend.encode(text, add_special_tokens=False)
    except Exception:  # tokenizers raises nothing narrower
        return False
    return True
