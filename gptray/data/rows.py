"""Reads rows of text files: lines or JSON objects, with messages for invalid ones.

Text is decoded by its file's `encoding`.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from io import BufferedReader
from typing import TypedDict, Unpack

import pyarrow as pa

from gptray.config import UserError
from gptray.data.encoding import UTF8, check_head, decoded, stream_encoding, undecodable
from gptray.data.sources import SourceFile
from gptray.wording import shortened

BOM = codecs.BOM_UTF8
# Python reads no longer integers.
MAX_DIGITS = sys.get_int_max_str_digits()
# How many columns a message lists, and how much of each name.
_LISTED_COLUMNS, _NAME_CHARACTERS = 30, 40
# How much of a text that is not JSON a message shows.
_FOUND_CHARACTERS = 21
_SPACE = re.compile(r"[ \t\r\n]*")
_NOT_LINES = "if it is an array, or its rows span lines, name the file .json"


def text_lines(file: SourceFile, stream: BufferedReader) -> Iterator[str]:
    """The lines of a stream with their line ends. Raises UserError, naming an undecodable line."""
    codec = stream_encoding(stream, file.encoding)
    if codec != UTF8:
        yield from _lines(decoded(file.name, stream, codec))
        return
    check_head(file.name, stream.peek())
    for number, raw in enumerate(stream, start=1):
        try:
            yield (raw.removeprefix(BOM) if number == 1 else raw).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{file.name}:{number}: {undecodable(error)}") from None


def _lines(texts: Iterator[str]) -> Iterator[str]:
    begun: list[str] = []  # parts of a line that continues in the next text
    for text in texts:
        *whole, rest = text.split("\n")
        for line in whole:
            yield "".join([*begun, line, "\n"])
            begun = []
        begun.append(rest)
    last = "".join(begun)
    if last:
        yield last


class JsonHooks(TypedDict, total=False):
    """Parameters of `json.loads` and `json.JSONDecoder`."""

    object_pairs_hook: Callable[[list[tuple[str, object]]], object]
    parse_constant: Callable[[str], object]
    parse_float: Callable[[str], object]
    parse_int: Callable[[str], object]


def json_line(raw: bytes | str, **hooks: Unpack[JsonHooks]) -> dict[str, object]:
    """As `json_object`, for a line of a file whose rows are lines."""
    try:
        return json_object(raw, **hooks)
    except ValueError as error:
        first = raw.strip() if isinstance(raw, str) else raw.decode("utf-8", "replace").strip()
        if first.startswith("[") or first == "{":
            raise ValueError(f"{error}; {_NOT_LINES}") from None
        raise


def json_object(raw: bytes | str, **hooks: Unpack[JsonHooks]) -> dict[str, object]:
    """The JSON object on a line. Raises ValueError without the place, which the caller adds.

    hooks: those of `json.loads`, to refuse more than it does.
    """
    try:
        # Without the line's end, behind which the place of an error would be on the next line.
        row = json.loads(raw.rstrip(), **hooks)
    except (ValueError, RecursionError) as error:
        raise ValueError(_unreadable(error)) from None
    return _checked_object(row)


def _unreadable(error: ValueError | RecursionError) -> str:
    """Say why JSON cannot be read; a hook's error has its own message."""
    if isinstance(error, UnicodeDecodeError):
        return undecodable(error)
    if isinstance(error, json.JSONDecodeError):
        line = error.doc[error.pos :].partition("\n")[0].rstrip()
        found = shortened(line, _FOUND_CHARACTERS, mark="\u2026")
        return f"not JSON: {error.msg} (column {error.colno}{f': {found}' if found else ''})"
    if isinstance(error, RecursionError):
        return "cannot be read as JSON: nested too deeply"
    is_long = "sys.set_int_max_str_digits" in str(error)
    return f"a number has more than {MAX_DIGITS:,} digits" if is_long else str(error)


def _checked_object(row: object) -> dict[str, object]:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {kind_of(row)}")
    return row


def json_rows(
    file: SourceFile, **hooks: Unpack[JsonHooks]
) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield (line, object) of a .json file: an array of objects, or concatenated objects.

    Holds one object at a time. hooks: those of `json.JSONDecoder`. Raises UserError, naming the
    line, for anything else.
    """
    with file.open() as stream:
        codec = stream_encoding(stream, file.encoding)
        values = _JsonValues(decoded(file.name, stream, codec), json.JSONDecoder(**hooks))
        line = 1
        try:
            for line, row in values:
                yield line, _checked_object(row)
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                line = values.line_of(error)
            elif isinstance(error, RecursionError):
                line = values.line
            raise UserError(f"{file.name}:{line}: {_unreadable(error)}") from None


class _JsonValues:
    """Iterates over the values in a stream of JSON text, each with the line where it begins."""

    def __init__(self, texts: Iterator[str], decoder: json.JSONDecoder) -> None:
        self.line = self._held_line = 1
        self._texts = texts
        self._held = ""
        self._at = 0  # position in _held, which begins on _held_line
        self._decoder = decoder

    def __iter__(self) -> Iterator[tuple[int, object]]:
        if self._next_character() != "[":
            while self._next_character():
                yield self.line, self._value()
            return
        self._at += 1
        following = self._next_character()
        while following != "]":
            yield self.line, self._value()
            following = self._next_character()
            if following == ",":
                self._at += 1
                self._next_character()
            elif following != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", self._held, self._at)
        self._at += 1
        if self._next_character():
            raise json.JSONDecodeError("Extra data", self._held, self._at)

    def line_of(self, error: json.JSONDecodeError) -> int:
        return self._held_line + error.lineno - 1

    def _next_character(self) -> str:
        """Skip white space and return the next character without consuming it; "" at the end."""
        while True:
            space = _SPACE.match(self._held, self._at)
            assert space
            self.line += self._held.count("\n", self._at, space.end())
            self._at = space.end()
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._read():
                return ""

    def _value(self) -> object:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._held, self._at)
            except json.JSONDecodeError as error:
                # A value that is cut off here may continue in the next text.
                may_go_on = error.msg.startswith("Unterminated") or len(self._held) - error.pos < 12
                if not (may_go_on and self._read()):
                    raise
                continue
            self.line += self._held.count("\n", self._at, end)
            self._at = end
            return value

    def _read(self) -> bool:
        """Read more text, at least as much as is held, so that a long value is parsed few times."""
        parts, size = [self._held[self._at :]], 0
        for text in self._texts:
            parts.append(text)
            size += len(text)
            if size >= len(parts[0]):
                break
        if not size:
            return False
        self._held, self._at, self._held_line = "".join(parts), 0, self.line
        return True


def no_column(text_column: str, columns: Sequence[str], *, key: str = "data.text_column") -> str:
    """The message about a missing column, listing the existing ones, the most similar first."""
    likeness = {name: SequenceMatcher(None, text_column, name).ratio() for name in columns}
    names = sorted(columns, key=lambda name: -likeness[name])
    listed = ", ".join(map(_column_name, names[:_LISTED_COLUMNS])) or "none at all"
    if len(names) > _LISTED_COLUMNS:
        listed += f" and {len(names) - _LISTED_COLUMNS:,} more"
    return f"no column {text_column!r}; columns: {listed} (set {key} to choose one)"


def _column_name(name: str) -> str:
    """A column's name for a list, quoted if it would be misread; a text in its place is cut."""
    name = shortened(name, _NAME_CHARACTERS, mark="\u2026")
    return name if name.isprintable() and name.strip() == name != "" else repr(name)


def several_columns(name: str) -> str:
    """The message about two columns or more of one name."""
    return f"several columns are named {name!r}; rename all but one"


def kind_of(value: object) -> str:
    """The kind of a JSON value, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def is_text(kind: pa.DataType) -> bool:
    """Whether a Parquet column of this type holds text."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(is_kind(plain) for is_kind in checks)


def is_list(kind: pa.DataType) -> bool:
    """Whether a Parquet column of this type holds lists of objects, such as messages."""
    checks = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(kind) for is_kind in checks) and pa.types.is_struct(kind.value_type)
