"""Cuts a corpus into pieces that tasks read independently.

A piece is a byte range of a text or JSON Lines file, some row groups of a Parquet file, or a whole
file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import parquet

from gptray.config import UserError
from gptray.data.encoding import UTF8, stream_encoding
from gptray.data.file_kinds import PARQUET, refuse_other_kind
from gptray.data.sources import SourceFile

UNIT_PIECES = 1000  # at most in a unit: opening many small files takes longer than reading them


@dataclass(frozen=True)
class Reading:
    """How to find documents in the files of a source: the config's keys of these names.

    tokenizer: also one trained here; the chat template of any other writes chats as text.
    """

    text_column: str | None = None
    separator: str | None = None
    tokenizer: str = "bpe"
    eos_token: str | None = None


@dataclass(frozen=True)
class Piece:
    """The part of a file that one task reads: bytes [start, stop), or row groups of Parquet."""

    file: SourceFile
    start: int
    stop: int
    reading: Reading


def plan_pieces(
    files: Sequence[SourceFile], reading: Reading, *, piece_bytes: int, cut_text: bool
) -> list[list[Piece]]:
    """Group the corpus, in order, into units of work of about `piece_bytes`.

    The plan depends only on the files, never on the cluster. Text files stay whole unless
    `cut_text` is set or a separator is given. Compressed, CSV and JSON files, and encodings other
    than UTF-8, always stay whole, because reading cannot start in the middle.
    """
    units: list[list[Piece]] = []
    room = 0
    for file in files:
        for piece, size in _pieces(file, reading, piece_bytes, cut_text=cut_text):
            if not units or size > room or len(units[-1]) == UNIT_PIECES:
                units.append([])
                room = piece_bytes
            units[-1].append(piece)
            room -= size
    return units


def _pieces(
    file: SourceFile, reading: Reading, piece_bytes: int, *, cut_text: bool
) -> Iterator[tuple[Piece, int]]:
    if file.format == "parquet":
        yield from _row_group_pieces(file, reading, piece_bytes)
        return
    whole = file.compression is not None or file.format in ("csv", "json")
    whole = whole or (file.format == "txt" and not cut_text and reading.separator is None)
    whole = whole or file.size <= piece_bytes or file_encoding(file) != UTF8
    size = max(file.size, 1)  # an empty file is a piece too
    step = size if whole else piece_bytes
    for start in range(0, size, step):
        stop = min(start + step, file.size)
        yield Piece(file, start, stop, reading), stop - start


def file_encoding(file: SourceFile) -> str:
    """A text file's encoding: as asked for, by its byte order mark, or UTF-8."""
    with file.open() as stream:
        return stream_encoding(stream, file.encoding)


def _row_group_pieces(
    file: SourceFile, reading: Reading, piece_bytes: int
) -> Iterator[tuple[Piece, int]]:
    start = size = 0
    metadata = open_parquet(file).metadata
    if not metadata.num_row_groups:
        yield Piece(file, 0, 0, reading), 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= piece_bytes or group == metadata.num_row_groups - 1:
            yield Piece(file, start, group + 1, reading), size
            start, size = group + 1, 0


def open_parquet(file: SourceFile) -> parquet.ParquetFile:
    """Open a Parquet file and read its metadata. Raises UserError if it is damaged or truncated."""
    try:
        return parquet.ParquetFile(file.open_stored())
    except (pa.ArrowInvalid, OSError) as error:
        with file.open() as stream:
            head = stream.peek()
        if not head.startswith(PARQUET):
            refuse_other_kind(file.name, head)
        raise UserError(f"{file.name}: not a complete Parquet file: {error}") from None
