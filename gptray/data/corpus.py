"""Documents out of files, in a stream: pieces of files that tasks can read on their own.

A piece is a byte range of a text or JSON Lines file, some row groups of a Parquet file, or a
whole file. Reading one holds about a megabyte. Errors name the file and the line (Parquet: row).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from gptray.config import UserError
from gptray.data.boundary import byte_boundary, last_boundary
from gptray.data.rows import BOM, csv_rows, is_text, json_object, kind_of, no_column
from gptray.data.sources import SourceFile

BLOCK_BYTES = 1 << 20


class Part(NamedTuple):
    """A run of a document's text; `ends` on its last one. An empty row is `Part("", True)`."""

    text: str
    ends: bool


EMPTY_ROW = Part("", True)


@dataclass(frozen=True)
class Piece:
    """What one task reads of a file: bytes [start, stop), or row groups for Parquet."""

    file: SourceFile
    start: int
    stop: int


def read_parts(piece: Piece, text_column: str) -> Iterator[Part]:
    """Read a piece's documents. A text file is one document and may go on in the next piece.

    Raises UserError at the first line that cannot be read.
    """
    readers: dict[str, Callable[[Piece, str], Iterator[Part]]] = {
        "txt": _read_text, "jsonl": _read_json_lines, "csv": _read_csv, "parquet": _read_parquet
    }  # fmt: skip
    try:
        yield from readers[piece.file.format](piece, text_column)
    except OSError as error:  # a truncated or damaged stream; opening it has its own message
        raise UserError(f"{piece.file.name}: cannot be read to its end: {error}") from None


def plan_pieces(
    files: Sequence[SourceFile], *, piece_bytes: int, cut_text: bool
) -> list[list[Piece]]:
    """Group the corpus, in order, into units of work of about `piece_bytes`.

    The plan depends on the files alone, never on the cluster. Text files stay whole unless
    `cut_text`. Compressed and CSV files are always whole: neither can be entered in the middle.
    """
    units: list[list[Piece]] = []
    room = 0
    for file in files:
        for piece, size in _pieces(file, piece_bytes, cut_text=cut_text):
            if not units or size > room:
                units.append([])
                room = piece_bytes
            units[-1].append(piece)
            room -= size
    return units


def _pieces(file: SourceFile, piece_bytes: int, *, cut_text: bool) -> Iterator[tuple[Piece, int]]:
    if file.format == "parquet":
        yield from _row_group_pieces(file, piece_bytes)
        return
    whole = file.compression is not None or file.format == "csv"
    whole = whole or (file.format == "txt" and not cut_text)
    step = max(file.size, 1) if whole else piece_bytes
    for start in range(0, file.size, step):
        stop = min(start + step, file.size)
        yield Piece(file, start, stop), stop - start


def _row_group_pieces(file: SourceFile, piece_bytes: int) -> Iterator[tuple[Piece, int]]:
    start = size = 0
    metadata = open_parquet(file).metadata
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= piece_bytes or group == metadata.num_row_groups - 1:
            yield Piece(file, start, group + 1), size
            start, size = group + 1, 0


def _read_text(piece: Piece, text_column: str) -> Iterator[Part]:
    file = piece.file
    with file.open() as stream:
        start, stop, end = 0, -1, -1  # -1: to the end of a stream of unknown size
        if file.compression is None:
            end = file.size
            start, stop = (byte_boundary(stream, at, end) for at in (piece.start, piece.stop))
            stream.seek(start)
        if start == stop:
            return
        held = ""
        fresh = start == 0
        for text in _decoded(file, stream, start, stop):
            held += text
            # Text without a place to cut goes on too, but for its end, which is told apart below.
            cut = last_boundary(held) or (len(held) - 1 if len(held) > BLOCK_BYTES else 0)
            if cut:
                yield Part(held[:cut], False)
                held, fresh = held[cut:], False
        if stop == end:
            # Nothing but white space is no document.
            yield EMPTY_ROW if fresh and not held.strip() else Part(held, True)
        elif held:
            yield Part(held, False)


def _decoded(file: SourceFile, stream: BinaryIO, start: int, stop: int) -> Iterator[str]:
    """Decode bytes [start, stop) strictly; newlines stay as they are, a byte order mark goes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = start
    while True:
        block = stream.read(BLOCK_BYTES if stop < 0 else min(BLOCK_BYTES, stop - position))
        held = decoder.getstate()[0]
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = _line_at(file, position - len(held) + error.start)
            raise UserError(f"{file.name}:{line}: not UTF-8: {error.reason}") from None
        if position == 0:
            text = text.removeprefix("\ufeff")
        position += len(block)
        if text:
            yield text
        if not block:
            return


def _line_at(file: SourceFile, offset: int) -> int:
    """The line (from 1) that holds byte `offset` of the uncompressed text."""
    line = 1
    with file.open() as stream:
        while offset > 0 and (block := stream.read(min(BLOCK_BYTES, offset))):
            line += block.count(b"\n")
            offset -= len(block)
    return line


def _read_json_lines(piece: Piece, text_column: str) -> Iterator[Part]:
    """Read the lines that begin in the piece; the first may begin in its neighbour."""
    file = piece.file
    stop = piece.stop if file.compression is None else None
    begin = max(piece.start - 1, 0)
    with file.open(begin) as stream:
        position = begin
        if piece.start:
            position += len(stream.readline())
        line = 0
        while (stop is None or position < stop) and (raw := stream.readline()):
            line += 1
            try:
                yield _json_text(raw.removeprefix(BOM) if position == 0 else raw, text_column)
            except ValueError as error:
                number = line if not piece.start else _line_at(file, position)
                raise UserError(f"{file.name}:{number}: {error}") from None
            position += len(raw)


def _json_text(raw: bytes, text_column: str) -> Part:
    if not raw.strip():
        return EMPTY_ROW
    row = json_object(raw)
    if text_column not in row:
        raise ValueError(no_column(text_column, list(row)))
    return _row(row[text_column], text_column)


def _row(value: Any, text_column: str) -> Part:
    """Check one row's text. Raises ValueError without the place, which the caller knows."""
    if not isinstance(value, str):
        raise ValueError(f"column {text_column!r} holds {kind_of(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"column {text_column!r} holds half a surrogate pair") from None
    return Part(value, True) if value.strip() else EMPTY_ROW


def _read_csv(piece: Piece, text_column: str) -> Iterator[Part]:
    rows = csv_rows(piece.file)
    line, header = next(rows, (1, []))
    try:
        if text_column not in header:
            raise ValueError(no_column(text_column, header))
        column = header.index(text_column)
        for line, row in rows:  # noqa: B007 - the message below tells it
            yield _row(row[column], text_column) if row else EMPTY_ROW
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{piece.file.name}:{line}: {error}") from None


def open_parquet(file: SourceFile) -> parquet.ParquetFile:
    """Open a Parquet file's metadata. Raises UserError for a damaged or truncated one."""
    try:
        return parquet.ParquetFile(file.path, filesystem=file.filesystem)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file.name}: not a whole Parquet file: {error}") from None


def _read_parquet(piece: Piece, text_column: str) -> Iterator[Part]:
    file = piece.file
    table = open_parquet(file)
    check_parquet_column(file, table.schema_arrow, text_column)
    groups = range(piece.start, piece.stop)
    row = sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
    try:
        for batch in table.iter_batches(batch_size=256, row_groups=groups, columns=[text_column]):
            for value in batch.column(0):
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


def check_column(file: SourceFile, text_column: str) -> None:
    """Look at the file's beginning only: raise UserError unless it has the column."""
    if file.format == "parquet":
        check_parquet_column(file, open_parquet(file).schema_arrow, text_column)
    elif file.format != "txt":
        next(read_parts(Piece(file, 0, file.size), text_column), None)


def check_parquet_column(file: SourceFile, schema: pa.Schema, text_column: str) -> None:
    """Raise UserError unless the column exists and holds text."""
    if text_column not in schema.names:
        raise UserError(f"{file.name}: {no_column(text_column, schema.names)}")
    kind = schema.field(text_column).type
    if not is_text(kind):
        raise UserError(f"{file.name}: column {text_column!r} holds {kind}, not text")
