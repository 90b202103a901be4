"""Where text can be cut without changing its tokens, so that no long text is held in memory.

There are two such places: between a letter or digit and a space or newline, and between a single
newline and a letter or digit (text without spaces, such as Chinese, has only those). GPT-2's,
Llama 3's and Qwen's pre-tokenizers split there; see `Tokenizer.cuts_at_boundaries`.
"""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterator
from typing import BinaryIO

_BOUNDARY = re.compile(r"(?=[ \n])(?<=[^\W_])|(?<=\n)(?=[^\W_])(?<=\S\n)")
_LAST = re.compile(f"(?s).*(?:{_BOUNDARY.pattern})")
_LOOKBEHIND = 2  # characters
_WINDOW = 1 << 16  # bytes
# Bytes to search for a boundary; without one, text is cut where a piece of the file begins.
LONGEST_RUN = 1 << 20
# Longest word given to a tokenizer's trainer, whose time grows with the length of words.
LONGEST_WORD = 256
_LONG = re.compile(rf"\S{{{LONGEST_WORD + 1}}}|\s{{{LONGEST_WORD + 1}}}")
_KINDS = (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s")
_LONG_WORD = re.compile("|".join(rf"{kind}{{{LONGEST_WORD + 1},}}" for kind in _KINDS))


def chunks(text: str) -> list[str]:
    """Cut `text` at every boundary, mostly into words."""
    return _BOUNDARY.split(text)


def last_boundary(text: str) -> int:
    """Position of the last boundary in `text`; 0 if there is none."""
    match = _LAST.match(text)
    return match.end() if match else 0


def first_boundary(text: str, start: int = 0, stop: int = sys.maxsize) -> int:
    """Position of the first boundary in `text[:stop]` at or after `start`; 0 if there is none."""
    match = _BOUNDARY.search(text, start, stop)
    return match.end() if match else 0


def short_words(text: str) -> Iterator[str]:
    """Yield the text, cut inside runs of letters, digits, symbols or space above LONGEST_WORD.

    Only for training a tokenizer; most texts come back whole.
    """
    start = 0
    if _LONG.search(text):
        for match in _LONG_WORD.finditer(text):
            for stop in range(match.start() + LONGEST_WORD, match.end(), LONGEST_WORD):
                yield text[start:stop]
                start = stop
    yield text[start:]


def byte_boundary(stream: BinaryIO, offset: int, size: int) -> int:
    """The first boundary at or after byte `offset` of a UTF-8 file of `size` bytes, or `size`.

    Without one in LONGEST_RUN bytes, the first character at or after `offset`. The result depends
    only on the file and the offset, so neighbouring pieces agree on their border.
    """
    if offset <= 0 or offset >= size:
        return min(max(offset, 0), size)
    stream.seek(offset)
    # Not strict: whoever reads the text reports invalid bytes with their line.
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    behind, skipped = "", 0  # the characters before the window, the bytes up to it
    while skipped < LONGEST_RUN:
        block = stream.read(_WINDOW)
        text = behind + decoder.decode(block, final=not block)
        cut = first_boundary(text, len(behind))
        if cut:
            return offset + skipped + _bytes_in(text[len(behind) : cut])
        if not block:
            return size
        skipped += _bytes_in(text[len(behind) :])
        behind = text[-_LOOKBEHIND:]
    return _character_start(stream, offset)


def separator_border(
    stream: BinaryIO, offset: int, stop: int, size: int, separator: bytes
) -> int | None:
    """The first separator at or after byte `offset` of a file, or the file's end.

    None if there is none before `stop`. Of overlapping separators only the first counts, wherever
    reading begins.
    """
    if offset <= 0 or offset >= size:
        return min(max(offset, 0), size)
    at = max(offset - len(separator) + 1, 0)
    stream.seek(at)
    held, latest = b"", -len(separator)
    while at < stop and (block := stream.read(_WINDOW)):
        held += block
        found = held.find(separator)
        while found >= 0:
            position, before = at + found, latest
            latest = position
            if position >= stop:
                return None
            if position >= offset and position - before >= len(separator):
                return position
            found = held.find(separator, found + 1)
        kept = max(len(held) - len(separator) + 1, 0)
        at, held = at + kept, held[kept:]
    return size if stop >= size else None


def _bytes_in(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def _character_start(stream: BinaryIO, offset: int) -> int:
    stream.seek(offset)
    inside = 0
    for byte in stream.read(3):
        if byte & 0xC0 != 0x80:
            break
        inside += 1
    return offset + inside
