"""Guards against hostile tokenizers, which would exhaust memory, and against unknown text.

A tokenizer that makes text grow without end, or has huge ids, is well-formed; a process that
opened it would simply run out of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import tokenizers

from gptray.config import UserError

# Real normalizers (NFKC) turn one character into at most 18.
_MAX_GROWTH = 64
# Ids may have gaps: reserved tokens, or added tokens that begin at a round number.
_MAX_IDS_PER_TOKEN, _MAX_SPARE_IDS = 4, 1 << 16
_SHOWN = 40  # characters of an unknown piece


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn a panic of the tokenizers library, which is not an Exception, into ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library panicked: {error}") from None


def check_growth(parts: Mapping[str, object]) -> None:
    """Refuse a tokenizer.json that expands a character too much. Raises ValueError."""
    for name in ("normalizer", "decoder"):
        growth = _growth(parts.get(name))
        if growth > _MAX_GROWTH:
            raise ValueError(
                f"its {name} turns one character into up to {growth:,}; at most {_MAX_GROWTH} are "
                "allowed"
            )


def _growth(part: object) -> int:
    """The most characters into which a normalizer or decoder can turn one by replacing text."""
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
    """Refuse token ids far above the number of tokens. Raises ValueError."""
    vocab = backend.get_vocab(with_added_tokens=True)
    if not vocab:
        raise ValueError("its vocabulary is empty")
    name = max(vocab, key=vocab.__getitem__)
    if vocab[name] > _MAX_IDS_PER_TOKEN * len(vocab) + _MAX_SPARE_IDS:
        raise ValueError(
            f"token {name!r:.60} has id {vocab[name]:,}, but there are only {len(vocab):,} tokens"
        )


class UnreadableText(UserError):
    """Text with a `piece` that a tokenizer without an unknown token cannot encode."""

    def __init__(self, message: str, piece: str) -> None:
        super().__init__(message)
        self.piece = piece

    def __reduce__(self) -> tuple[type[UnreadableText], tuple[str, str]]:
        return type(self), (str(self), self.piece)


def unreadable(
    backend: tokenizers.Tokenizer, texts: Sequence[str], error: Exception
) -> UnreadableText:
    """Find the piece that a model without an unknown token could not encode. error: its own."""
    text = next(text for text in texts if not _can_read(backend, text))
    words = (word for word in text.split() if not _can_read(backend, word))
    word = next(words, text)
    piece = next((one for one in word if not _can_read(backend, one)), word)
    kind = type(backend.model).__name__
    if "\ud800" <= piece <= "\udfff":
        return UnreadableText(f"the text holds half a surrogate pair, {piece!r}", piece)
    if kind == "WordLevel":
        piece = word
    return UnreadableText(
        f"the tokenizer ({kind}) does not know {piece[:_SHOWN]!r} and has no unknown token "
        f"({str(error).strip()}); add one (unk_token), or choose data.tokenizer=bpe, which reads "
        "any text",
        piece,
    )


def _can_read(backend: tokenizers.Tokenizer, text: str) -> bool:
    try:
        with panics_as_errors():
            backend.encode(text, add_special_tokens=False)
    except Exception:  # tokenizers raises nothing narrower
        return False
    return True
