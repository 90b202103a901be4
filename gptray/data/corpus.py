"""Streams the documents of a piece of a corpus.

Holds about a megabyte at a time. Errors name the file and the line (Parquet: row).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BufferedReader
from itertools import chain
from typing import NamedTuple, TypeVar

import pyarrow as pa

from gptray.config import UserError
from gptray.data.batches import declared_schema, first_row
from gptray.data.boundary import byte_boundary, separator_border
from gptray.data.chats import NoTemplate, RowReader, text_columns
from gptray.data.csv_text import csv_rows, separator_hint
from gptray.data.documents import EMPTY_ROW, Part, one_document, split_documents
from gptray.data.encoding import BLOCK_BYTES, UTF8, check_head, decoded, stream_encoding
from gptray.data.pieces import Piece, Reading, open_parquet
from gptray.data.rows import (
    BOM,
    is_list,
    is_text,
    json_line,
    json_rows,
    several_columns,
    text_lines,
)
from gptray.data.sources import SourceFile

T = TypeVar("T")
# How far `first_look` reads into a file, and at most into one of chats, which take longer.
_FIRST_LOOK, _FIRST_CHATS = 1 << 16, 1 << 21  # characters


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
    file, reader = piece.file, RowReader(piece.reading)
    stop = piece.stop if file.compression is None else None
    begin = max(piece.start - 1, 0)
    with file.open(begin) as stream:
        if begin == 0 and stream_encoding(stream, file.encoding) != UTF8:
            lines = enumerate(text_lines(file, stream), start=1)
            yield from _parts(file, lines, lambda line: _json_text(line, reader))
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
                yield _json_text(raw.removeprefix(BOM) if position == 0 else raw, reader)
            except ValueError as error:
                number = line if not piece.start else _line_at(file, position)
                raise _placed(f"{file.name}:{number}", error) from None
            position += len(raw)


def _skip_line(stream: BufferedReader, most: int) -> int:
    """Skip past the end of the line, by at most `most` bytes; return how many."""
    skipped = 0
    while skipped < most and (raw := stream.readline(min(BLOCK_BYTES, most - skipped))):
        skipped += len(raw)
        if raw.endswith(b"\n"):
            break
    return skipped


def _json_text(raw: bytes | str, reader: RowReader) -> Part:
    return _json_row(json_line(raw), reader) if raw.strip() else EMPTY_ROW


def _json_row(row: dict[str, object], reader: RowReader) -> Part:
    """Null is a missing text; a row without the column is a mistake (ValueError)."""
    columns = reader.columns(row)
    return reader.part([row[name] for name in columns], columns)


def _read_json(piece: Piece) -> Iterator[Part]:
    reader = RowReader(piece.reading)
    return _parts(piece.file, json_rows(piece.file), lambda row: _json_row(row, reader))


def _read_csv(piece: Piece) -> Iterator[Part]:
    file, reader = piece.file, RowReader(piece.reading)
    rows = csv_rows(file)
    line, header = next(rows, (1, []))
    try:
        columns = reader.columns(header)
    except ValueError as problem:
        raise UserError(f"{file.name}:{line}: {problem}{separator_hint(header)}") from None
    for name in columns:
        if header.count(name) > 1:
            raise UserError(f"{file.name}:{line}: {several_columns(name)}")
    places = [header.index(name) for name in columns]

    def read(row: list[str]) -> Part:
        return reader.part([row[at] for at in places], columns) if row else EMPTY_ROW

    return _parts(file, rows, read)


def _parts(
    file: SourceFile, rows: Iterable[tuple[int, T]], read: Callable[[T], Part]
) -> Iterator[Part]:
    """Yield `read` of each row; turn its ValueError into a UserError with the row's line."""
    for line, row in rows:
        try:
            part = read(row)
        except ValueError as error:
            raise _placed(f"{file.name}:{line}", error) from None
        yield part


def _placed(place: str, error: ValueError) -> UserError:
    """The error of a row, with its place in front."""
    kind = NoTemplate if isinstance(error, NoTemplate) else UserError
    return kind(f"{place}: {error}")


def _read_parquet(piece: Piece) -> Iterator[Part]:
    file, reader = piece.file, RowReader(piece.reading)
    groups = range(piece.start, piece.stop)
    table = open_parquet(file)
    columns = parquet_columns(file, table.schema_arrow, piece.reading.text_column)
    row = sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
    try:
        # Group by group: Arrow cannot read a dictionary in a list across row groups.
        for batch in chain.from_iterable(
            table.iter_batches(batch_size=256, row_groups=[group], columns=[*columns])
            for group in groups
        ):
            for values in zip(*(batch.column(name) for name in columns), strict=True):
                row += 1
                yield reader.part([value.as_py() for value in values], columns)
    except NoTemplate as error:
        raise _placed(f"{file.name}: row {row}", error) from None
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: row {row}: not UTF-8: {error.reason}") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{file.name}: after row {row}: cannot be read: {error}") from None
    except ValueError as error:
        raise UserError(f"{file.name}: row {row}: {error}") from None


class Look(NamedTuple):
    """What a file holds, as far as is known: any text, and chats among it."""

    has_text: bool
    has_chats: bool = False


def first_look(file: SourceFile, reading: Reading, *, whole: bool = False) -> Look:
    """Read the file's beginning, or all of it: raise UserError if that fails.

    Finds a missing column, a wrong encoding, and a bad row among those read. Of text in Parquet,
    only the metadata is read.
    """
    stop = file.size
    if file.format == "parquet":
        table = open_parquet(file)
        columns = parquet_columns(file, table.schema_arrow, reading.text_column)
        kinds = [table.schema_arrow.field(name).type for name in columns]
        if not any(map(is_list, kinds)):
            is_missing = any(map(pa.types.is_null, kinds))
            return Look(bool(table.metadata.num_rows) and not is_missing)
        stop = table.metadata.num_row_groups
    seen, has_text, has_chats = 0, False, False
    for part in read_parts(Piece(file, 0, stop, reading)):
        seen += len(part.text) + 1
        has_text |= part != EMPTY_ROW
        has_chats |= part.is_chat
        if seen > _FIRST_LOOK and not whole or seen > _FIRST_CHATS and has_chats:
            break
    return Look(has_text, has_chats)


def chosen_columns(file: SourceFile, reading: Reading) -> tuple[str, ...]:
    """The `text_columns` of a file of rows, or of its first row; none if it has no rows."""
    schema = declared_schema(file, "")
    first = first_row(file) if schema is None else None
    names = [*first[1]] if first else schema.names if schema is not None else []
    return text_columns(names, reading.text_column) if names else ()


def parquet_columns(file: SourceFile, schema: pa.Schema, asked: str | None) -> tuple[str, ...]:
    """The `text_columns` of a file.

    Raises UserError unless there is one of each name, and it holds text, chats or only nulls.
    """
    try:
        columns = text_columns(schema.names, asked)
    except ValueError as problem:
        raise UserError(f"{file.name}: {problem}") from None
    for name in columns:
        if schema.names.count(name) > 1:
            raise UserError(f"{file.name}: {several_columns(name)}")
        kind = schema.field(name).type
        if not is_text(kind) and not pa.types.is_null(kind) and not is_list(kind):
            raise UserError(f"{file.name}: column {name!r} holds {kind}, not text")
    return columns
