"""Reads the rows of CSV and TSV files, with messages for invalid ones."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from io import BufferedReader

from gptray.config import UserError
from gptray.data.rows import text_lines
from gptray.data.sources import SourceFile
from gptray.wording import count

# A carriage return that ends a line by itself, as old programs for the Mac write it.
_CARRIAGE_RETURN = re.compile(r"(?<=\r)(?!\n|$)")
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def csv_rows(file: SourceFile) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, fields) of every row, the header first; a blank line has no fields.

    Tabs separate the fields of a .tsv file. Raises UserError, naming the line, for invalid CSV or a
    row with another number of fields than the header.
    """
    csv.field_size_limit(2**31 - 1)  # a cell is a document: no limit of 128 kB
    with file.open() as stream:
        rows = csv.reader(
            _lines(file, stream), strict=True, delimiter="\t" if file.has_tabs else ","
        )
        line, width = 1, -1
        try:
            for row in rows:
                width = len(row) if width < 0 else width
                if row and len(row) != width:
                    found = count(len(row), "field")
                    raise UserError(f"{file.name}:{line}: {found}, but the header has {width}")
                yield line, row
                line = rows.line_num + 1
        except csv.Error as error:
            raise UserError(f"{file.name}:{line}: {_problem(error)}") from None


def separator_hint(header: Sequence[str]) -> str:
    """What to say of a header whose columns other characters seem to separate, or nothing."""
    used = [words for mark, words in _SEPARATORS.items() if len(header) == 1 and mark in header[0]]
    if not used:
        return ""
    return f"; {used[0]} seem to separate the columns: .csv needs commas, .tsv tabs"


def _lines(file: SourceFile, stream: BufferedReader) -> Iterator[str]:
    for line in text_lines(file, stream):
        yield from _CARRIAGE_RETURN.split(line) if "\r" in line[:-2] else (line,)


def _problem(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return "a field of this row begins with a quotation mark but never ends with one"
    if "expected after" in str(error):
        return "text follows a closing quotation mark; double the marks inside a quoted field"
    return str(error)
