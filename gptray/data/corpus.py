"""Streams the documents of a piece of a corpus.

Holds about a megabyte at a time. Errors name the file and the line (Parquet: row).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BufferedReader
from typing import TypeVar

import pyarrow as pa

from gptray.config import UserError
from gptray.data.boundary import byte_boundary, separator_border
from gptray.data.csv_text import csv_rows, separator_hint
from gptray.data.documents import EMPTY_ROW, Part, one_document, split_documents
from gptray.data.encoding import BLOCK_BYTES, UTF8, check_head, decoded, stream_encoding
from gptray.data.pieces import Piece, Reading, open_parquet
from gptray.data.rows import (
    BOM,
    is_text,
    json_line,
    json_rows,
    kind_of,
    no_column,
    several_columns,
    text_lines,
)
from gptray.data.sources import SourceFile

T = TypeVar("T")
# How far `first_look` reads into a file.
_FIRST_LOOK = 1 << 16  # characters


def read_parts(piece: Piece) -> Iterator[Part]:
    """Yield a piece's documents; in a text file without separator, one may span several pieces.

    Raises UserError at the first line that cannot be read.
    """
    readers: dict[str, Callable[[Piece], Iterator[Part]]] = {
        "txt": _read_text, "jsonl": _read_json_lines, "json": _read_json, "csv": _read_csv,
        "parquet": _read_parquet,
    }  # fmt: skip
    try:
        yield from readers[piece.file.format](piece)
    except OSError as error:  # open() has its own messages
        raise UserError(f"{piece.file.name}: truncated or damaged: {error}") from None


def _read_text(piece: Piece) -> Iterator[Part]:
    file, separator = piece.file, piece.reading.separator
    with file.open() as stream:
        codec = stream_encoding(stream, piece.file.encoding)
        start, stop, end = 0, -1, -1  # -1: to the end of a stream of unknown size
        if piece.start > 0 or piece.stop < file.size:
            end = file.size
            borders = _borders(piece, stream)
            if borders is None:
                return
            start, stop = borders
            stream.seek(start)
        size = stop - start if stop >= 0 else -1
        first_line = partial(_line_at, file, start)
        texts = decoded(
            file.name, stream, codec, size=size, first=start == 0, first_line=first_line
        )
        if separator is None:
            yield from one_document(texts, begins=start == 0, ends=stop == end)
        else:
            yield from split_documents(texts, separator)


def _borders(piece: Piece, stream: BufferedReader) -> tuple[int, int] | None:
    """A piece's byte range in a text file, moved to places to cut; None if that is empty."""
    size, separator = piece.file.size, piece.reading.separator
    if separator is None:
        start, stop = (byte_boundary(stream, at, size) for at in (piece.start, piece.stop))
    else:
        mark = separator.encode()
        found = separator_border(stream, piece.start, piece.stop, size, mark)
        if found is None:
            return None
        start, stop = found, separator_border(stream, piece.stop, size, size, mark) or size
    return (start, stop) if start < stop else None


def _line_at(file: SourceFile, offset: int) -> int:
    """The line (from 1) that holds byte `offset` of the uncompressed text."""
    line = 1
    with file.open() as stream:
        while offset > 0 and (block := stream.read(min(BLOCK_BYTES, offset))):
            line += block.count(b"\n")
            offset -= len(block)
    return line


def _read_json_lines(piece: Piece) -> Iterator[Part]:
    """Read the lines that begin in the piece; the first may begin in its neighbour."""
    file, column = piece.file, piece.reading.text_column
    stop = piece.stop if file.compression is None else None
    begin = max(piece.start - 1, 0)
    with file.open(begin) as stream:
        if begin == 0 and stream_encoding(stream, file.encoding) != UTF8:
            lines = enumerate(text_lines(file, stream), start=1)
            yield from _parts(file, lines, lambda line: _json_text(line, column))
            return
        position = begin
        if piece.start:
            position += _skip_line(stream, piece.stop - begin)
        else:
            check_head(file.name, stream.peek())
        line = 0
        while (stop is None or position < stop) and (raw := stream.readline()):
            line += 1
            try:
                yield _json_text(raw.removeprefix(BOM) if position == 0 else raw, column)
            except ValueError as error:
                number = line if not piece.start else _line_at(file, position)
                raise UserError(f"{file.name}:{number}: {error}") from None
            position += len(raw)


def _skip_line(stream: BufferedReader, most: int) -> int:
    """Skip past the end of the line, by at most `most` bytes; return how many."""
    skipped = 0
    while skipped < most and (raw := stream.readline(min(BLOCK_BYTES, most - skipped))):
        skipped += len(raw)
        if raw.endswith(b"\n"):
            break
    return skipped


def _json_text(raw: bytes | str, text_column: str) -> Part:
    if not raw.strip():
        return EMPTY_ROW
    return _json_row(json_line(raw), text_column)


def _json_row(row: dict[str, object], text_column: str) -> Part:
    """Null is a missing text; a row without the column is a mistake (ValueError)."""
    if text_column not in row:
        raise ValueError(no_column(text_column, list(row)))
    return _row(row[text_column], text_column)


def _read_json(piece: Piece) -> Iterator[Part]:
    column = piece.reading.text_column
    return _parts(piece.file, json_rows(piece.file), lambda row: _json_row(row, column))


def _row(value: object, text_column: str) -> Part:
    """Check one row's text; a missing one (null) is an empty row.

    Raises ValueError without the place, which the caller adds.
    """
    if value is None:
        return EMPTY_ROW
    if not isinstance(value, str):
        raise ValueError(f"column {text_column!r} holds {kind_of(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"column {text_column!r} holds half a surrogate pair") from None
    return Part(value, True) if value.strip() else EMPTY_ROW


def _read_csv(piece: Piece) -> Iterator[Part]:
    file, name = piece.file, piece.reading.text_column
    rows = csv_rows(file)
    line, header = next(rows, (1, []))
    if name not in header:
        problem = no_column(name, header) + separator_hint(header)
        raise UserError(f"{file.name}:{line}: {problem}")
    if header.count(name) > 1:
        raise UserError(f"{file.name}:{line}: {several_columns(name)}")
    place = header.index(name)
    return _parts(file, rows, lambda row: _row(row[place], name) if row else EMPTY_ROW)


def _parts(
    file: SourceFile, rows: Iterable[tuple[int, T]], read: Callable[[T], Part]
) -> Iterator[Part]:
    """Yield `read` of each row; turn its ValueError into a UserError with the row's line."""
    for line, row in rows:
        try:
            part = read(row)
        except ValueError as error:
            raise UserError(f"{file.name}:{line}: {error}") from None
        yield part


def _read_parquet(piece: Piece) -> Iterator[Part]:
    file, text_column = piece.file, piece.reading.text_column
    groups = range(piece.start, piece.stop)
    table = open_parquet(file)
    check_parquet_column(file, table.schema_arrow, text_column)
    row = sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
    try:
        for batch in table.iter_batches(batch_size=256, row_groups=groups, columns=[text_column]):
            for value in batch.column(text_column):
                row += 1
                yield _row(value.as_py(), text_column)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: row {row}: not UTF-8: {error.reason}") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{file.name}: after row {row}: cannot be read: {error}") from None
    except ValueError as error:
        raise UserError(f"{file.name}: row {row}: {error}") from None


def first_look(file: SourceFile, reading: Reading, *, whole: bool = False) -> bool:
    """Read the file's beginning, or all of it: raise UserError if that fails.

    Finds a missing column, a wrong encoding, and a bad row among those read. Returns whether there
    is text as far as is known; of Parquet, only the metadata is read.
    """
    if file.format == "parquet":
        table = open_parquet(file)
        check_parquet_column(file, table.schema_arrow, reading.text_column)
        is_null = pa.types.is_null(table.schema_arrow.field(reading.text_column).type)
        return bool(table.metadata.num_rows) and not is_null
    seen, has_text = 0, False
    for part in read_parts(Piece(file, 0, file.size, reading)):
        seen += len(part.text) + 1
        has_text |= part != EMPTY_ROW
        if seen > _FIRST_LOOK and not whole:
            return True
    return has_text


def check_parquet_column(file: SourceFile, schema: pa.Schema, text_column: str) -> None:
    """Raise UserError unless there is one such column, and it holds text or nothing but nulls."""
    if text_column not in schema.names:
        raise UserError(f"{file.name}: {no_column(text_column, schema.names)}")
    if schema.names.count(text_column) > 1:
        raise UserError(f"{file.name}: {several_columns(text_column)}")
    kind = schema.field(text_column).type
    if not is_text(kind) and not pa.types.is_null(kind):
        raise UserError(f"{file.name}: column {text_column!r} holds {kind}, not text")
