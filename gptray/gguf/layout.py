"""Reads the header of a GGUF file: its fields, and the places of its tensors.

The file may be damaged or hostile: nothing longer than the rest of the file is read.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "File Structure".
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from gptray.storage.stored import Unreadable, open_stored

_VERSIONS = (2, 3)
# Limits; real files have dozens of fields, some thousand tensors and two dimensions.
_MAX_FIELDS, _MAX_TENSORS, _MAX_DIMENSIONS = 1 << 12, 1 << 16, 4
# The most bytes of all fields together; a vocabulary of 256,000 tokens takes about 20 MB.
_MAX_BYTES = 256 << 20
# The types of values by GGUF's numbers, as formats of `struct`.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its shape in NumPy's order, GGML's type number, its offset in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


def read_header(path: Path) -> tuple[dict[str, object], list[Entry]]:
    """The fields and tensors of a GGUF file. Raises Unreadable, OSError."""
    with open_stored(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = _HeaderReader(file, min(size, _MAX_BYTES))
        try:
            return _read(head)
        except (UnicodeDecodeError, struct.error) as error:
            raise Unreadable(str(error)) from None


def _read(head: _HeaderReader) -> tuple[dict[str, object], list[Entry]]:
    if head.take(4) != b"GGUF":
        raise Unreadable("it is not a GGUF file")
    version = head.number("I")
    if version not in _VERSIONS:
        raise Unreadable(
            f"its version is {version}; only {' and '.join(map(str, _VERSIONS))} are supported"
        )
    tensors, fields = head.number("Q"), head.number("Q")
    if tensors > _MAX_TENSORS or fields > _MAX_FIELDS:
        raise Unreadable(f"it claims to have {tensors:,} tensors and {fields:,} fields")
    values = {}
    for _ in range(fields):
        key = head.text()
        values[key] = head.value(head.number("I"))
    found = [_entry(head) for _ in range(tensors)]
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16:
        raise Unreadable(f"its alignment is {alignment!r:.20}")
    first = head.position + -head.position % alignment
    return values, [Entry(one.name, one.shape, one.kind, first + one.start) for one in found]


def _entry(head: _HeaderReader) -> Entry:
    """Read a tensor's entry; its `start` is relative to the first tensor."""
    name, dimensions = head.text(), head.number("I")
    if dimensions > _MAX_DIMENSIONS:
        raise Unreadable(f"{name:.60} has {dimensions:,} dimensions")
    shape = tuple(head.number("Q") for _ in range(dimensions))
    return Entry(name, shape[::-1], head.number("I"), head.number("Q"))


class _HeaderReader:
    """Reads values from the beginning of a file, at most `left` bytes."""

    def __init__(self, file: BufferedReader, left: int) -> None:
        self._file, self._left = file, left

    @property
    def position(self) -> int:
        return self._file.tell()

    def take(self, count: int) -> bytes:
        """The next bytes. Raises Unreadable if there are fewer."""
        self._left -= count
        taken = self._file.read(count) if self._left >= 0 else b""
        if len(taken) < count:
            raise Unreadable("it ends too early")
        return taken

    def number(self, form: str) -> int:
        """The next number, in a format of `struct`."""
        number: int = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]
        return number

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> object:
        """The next value, of a type given by its number."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                size = struct.calcsize(_SCALARS[inner])
                return list(struct.unpack(f"<{count}{_SCALARS[inner]}", self.take(count * size)))
            if inner == _STRING:
                return [self.text() for _ in range(count)]  # each takes eight bytes at least
            raise Unreadable(f"it has an array of type {inner}")
        if kind not in _SCALARS:
            raise Unreadable(f"it has a value of type {kind}")
        return self.number(_SCALARS[kind])
