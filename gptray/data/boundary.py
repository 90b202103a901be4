"""Where text may be cut without changing its tokens, so that no long text is held whole.

Two places: between a letter or digit and a space or newline; and behind a single newline before
a letter or digit (text without spaces, such as Chinese, has only those). GPT-2's, Llama 3's and
Qwen's patterns start a new piece there; `Tokenizer.cuts_at_boundaries` tells if a tokenizer does.
"""

from __future__ import annotations

import re
from typing import BinaryIO

_BOUNDARY = re.compile(r"(?=[ \n])(?<=[^\W_])|(?<=\n)(?=[^\W_])(?<=\S\n)")
_LAST = re.compile(f"(?s).*(?:{_BOUNDARY.pattern})")
_WINDOW = 1 << 16  # bytes


def chunks(text: str) -> list[str]:
    """Cut `text` wherever it may be cut: words, mostly."""
    return _BOUNDARY.split(text)


def last_boundary(text: str) -> int:
    """Position of the last place to cut `text`; 0 when there is none."""
    match = _LAST.match(text)
    return match.end() if match else 0


def first_boundary(text: str, start: int = 0) -> int:
    """Position of the first place to cut `text` at or after `start`; 0 when there is none."""
    match = _BOUNDARY.search(text, start)
    return match.end() if match else 0


def byte_boundary(stream: BinaryIO, offset: int, size: int) -> int:
    """The first cut at or after byte `offset` of a UTF-8 file of `size` bytes, or `size`.

    A function of the file and the offset alone: neighbours that share a border agree on it.
    """
    if offset <= 0 or offset >= size:
        return min(max(offset, 0), size)
    stream.seek(offset)
    window = b""
    while block := stream.read(_WINDOW):
        window += block
        # Not strict: invalid bytes are reported with their line by whoever reads the text.
        text = window.decode("utf-8", "surrogateescape")
        cut = first_boundary(text)
        if cut:
            return offset + len(text[:cut].encode("utf-8", "surrogateescape"))
    return size
