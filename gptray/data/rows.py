"""Rows of text files: lines, JSON objects, CSV fields, and what is said of those that are none."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any, BinaryIO

import pyarrow as pa

from gptray.config import UserError
from gptray.data.sources import SourceFile

BOM = codecs.BOM_UTF8


def text_lines(file: SourceFile, stream: BinaryIO) -> Iterator[str]:
    """The lines of a stream, ends included. Raises UserError naming the line that is not UTF-8."""
    for number, raw in enumerate(stream, start=1):
        try:
            yield (raw.removeprefix(BOM) if number == 1 else raw).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{file.name}:{number}: not UTF-8: {error.reason}") from None


def json_object(raw: bytes | str, **hooks: Any) -> dict[str, Any]:
    """The JSON object on a line. Raises ValueError without the place, which the caller knows.

    hooks: of `json.loads`, where more is to be refused than it does.
    """
    try:
        row = json.loads(raw, **hooks)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {kind_of(row)}")
    return row


def csv_rows(file: SourceFile) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of every row, the header first; a blank line has no fields.

    Raises UserError naming the line that is no CSV or has not as many fields as the header.
    """
    csv.field_size_limit(2**31 - 1)  # a cell is a document: no limit of 128 kB
    with file.open() as stream:
        rows = csv.reader(text_lines(file, stream), strict=True)
        line, width = 1, -1
        try:
            for row in rows:
                width = len(row) if width < 0 else width
                if row and len(row) != width:
                    raise UserError(
                        f"{file.name}:{line}: {len(row)} fields where the header has {width}"
                    )
                yield line, row
                line = rows.line_num + 1
        except csv.Error as error:
            raise UserError(f"{file.name}:{line}: {error}") from None


def no_column(text_column: str, columns: Sequence[str], *, key: str = "data.text_column") -> str:
    """The message for a missing column: the ones that exist, the likeliest first."""
    likeness = {name: SequenceMatcher(None, text_column, name).ratio() for name in columns}
    listed = ", ".join(sorted(columns, key=lambda name: -likeness[name])) or "none at all"
    return f"no column {text_column!r}; columns: {listed} (choose by {key})"


def kind_of(value: Any) -> str:
    """What a value is, for people."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def is_text(kind: pa.DataType) -> bool:
    """Whether a Parquet column of this type holds text."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(is_kind(plain) for is_kind in checks)
