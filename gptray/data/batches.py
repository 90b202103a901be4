"""Reads a batch job's input in batches of rows: Arrow from Parquet, Python from text formats.

Parquet columns stay Arrow from end to end; only those that the job itself reads (prompts, ids,
settings) become Python values. Errors name the file and the line (Parquet: row).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa
from pyarrow import compute, parquet

from gptray.config import UserError
from gptray.data.csv_text import csv_rows
from gptray.data.json_columns import holds_json, json_text
from gptray.data.pieces import open_parquet
from gptray.data.rows import json_line, json_rows, several_columns, text_lines
from gptray.data.sources import SourceFile

BATCH_ROWS, BATCH_BYTES = 1024, 64 << 20
# The range of 64-bit nanoseconds, in microseconds around 1970.
_NS_RANGE_US = 2**63 // 1000

Values = dict[str, object]


@dataclass(frozen=True)
class ObjectBatch:
    """Rows of a text format as Python values by column, and the lines that they begin on."""

    file: SourceFile
    lines: Sequence[int]
    objects: Sequence[Values]

    @property
    def rows(self) -> int:
        return len(self.objects)

    def place(self, row: int) -> str:
        """Where a row of the batch (from 0) is in the file, for messages."""
        return f"{self.file.name}:{self.lines[row]}"

    def values(self, name: str) -> list[object]:
        """A column as Python values, null where a row has none."""
        return [row.get(name) for row in self.objects]

    def array(self, field: pa.Field) -> pa.Array:
        """A column as an Arrow array of the field's type, null where a row has none."""
        values = self.values(field.name)
        if holds_json(field):
            values = [None if value is None else json_text(value) for value in values]
        return pa.array(values, type=field.type)


@dataclass(frozen=True)
class ArrowBatch:
    """Rows of a Parquet file; `first` is the number of the first, from 1."""

    file: SourceFile
    first: int
    batch: pa.RecordBatch

    @property
    def rows(self) -> int:
        return int(self.batch.num_rows)

    def place(self, row: int) -> str:
        return f"{self.file.name}: row {self.first + row}"

    def values(self, name: str) -> list[object]:
        """As `ObjectBatch.values`. Raises UserError for text that is not UTF-8."""
        if name not in self.batch.schema.names:
            return [None] * self.rows
        column = self.batch.column(name)
        try:
            values: list[object] = column.to_pylist()
        except UnicodeDecodeError:
            row = next(row for row, value in enumerate(column) if not _is_readable(value))
            raise UserError(f"{self.place(row)}: column {name!r} is not UTF-8") from None
        return values

    def check_text(self, name: str) -> None:
        """Raise UserError if a text column is not UTF-8."""
        try:
            if name in self.batch.schema.names:
                self.batch.column(name).validate(full=True)
        except pa.ArrowInvalid:
            self.values(name)
            raise

    def array(self, field: pa.Field) -> pa.Array:
        if field.name not in self.batch.schema.names:
            return pa.nulls(self.rows, field.type)
        column = self.batch.column(field.name)
        # A column with nothing but nulls here takes its type from another file.
        return column if column.type == field.type else pa.nulls(self.rows, field.type)


# Consecutive rows of one file.
Batch = ObjectBatch | ArrowBatch


def read_batches(file: SourceFile, prompt_column: str) -> Iterator[Batch]:
    """Yield all rows of a file in order; `prompt_column` names the lines of a text file.

    Raises UserError for a file or row that cannot be read.
    """
    try:
        if file.format == "parquet":
            yield from _parquet_batches(file)
        else:
            yield from _object_batches(file, prompt_column)
    except (OSError, EOFError) as error:
        raise UserError(f"{file.name}: truncated or damaged: {error}") from None


def declared_schema(file: SourceFile, prompt_column: str) -> pa.Schema | None:
    """The columns that a file declares, without reading its rows; None for JSON, which has none.

    Raises UserError for two columns of one name.
    """
    if file.format == "parquet":
        schema = open_parquet(file).schema_arrow
    elif file.format == "csv":
        _, header = next(csv_rows(file), (1, []))
        schema = pa.schema([(name, pa.string()) for name in header])
    elif file.format == "txt":
        schema = pa.schema([(prompt_column, pa.string())])
    else:
        return None
    duplicate = _first_duplicate(schema.names)
    if duplicate is not None:
        raise UserError(f"{file.name}: {several_columns(duplicate)}")
    return schema


def first_row(file: SourceFile) -> tuple[str, Values] | None:
    """The place and values of a JSON file's first row, if it has one."""
    try:
        with_line = next(_json_rows(file), None)
    except (OSError, EOFError) as error:
        raise UserError(f"{file.name}: truncated or damaged: {error}") from None
    return with_line and (f"{file.name}:{with_line[0]}", with_line[1])


def is_json(file: SourceFile) -> bool:
    """Whether the file's rows are JSON objects."""
    return file.format not in ("parquet", "csv", "txt")


def _object_batches(file: SourceFile, prompt_column: str) -> Iterator[ObjectBatch]:
    lines: list[int] = []
    objects: list[Values] = []
    if file.format == "csv":
        rows = _csv_rows(file)
    else:
        rows = _lines(file, prompt_column) if file.format == "txt" else _json_rows(file)
    for line, values in rows:
        lines.append(line)
        objects.append(values)
        if len(lines) == BATCH_ROWS:
            yield ObjectBatch(file, lines, objects)
            lines, objects = [], []
    if lines:
        yield ObjectBatch(file, lines, objects)


def _lines(file: SourceFile, prompt_column: str) -> Iterator[tuple[int, Values]]:
    with file.open() as stream:
        for number, line in enumerate(text_lines(file, stream), start=1):
            yield number, {prompt_column: line.rstrip("\r\n")}


def _json_rows(file: SourceFile) -> Iterator[tuple[int, Values]]:
    if file.format == "json":
        yield from json_rows(file, object_pairs_hook=_object)
        return
    with file.open() as stream:
        for number, line in enumerate(text_lines(file, stream), start=1):
            if not line.strip():
                continue
            try:
                yield number, json_line(line, object_pairs_hook=_object)
            except ValueError as error:
                raise UserError(f"{file.name}:{number}: {error}") from None


def _object(pairs: list[tuple[str, object]]) -> Values:
    """A JSON object as a dict. Raises ValueError for a duplicate key."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"duplicate key {_first_duplicate(name for name, _ in pairs)!r}")
    return values


def _csv_rows(file: SourceFile) -> Iterator[tuple[int, Values]]:
    rows = csv_rows(file)
    _, header = next(rows, (1, []))
    for line, row in rows:
        if row:
            yield line, dict(zip(header, row, strict=True))


def _parquet_batches(file: SourceFile) -> Iterator[ArrowBatch]:
    reader = open_parquet(file)
    _refuse_far_int96(file, reader)
    row = 0
    try:
        for batch in _record_batches(reader):
            yield ArrowBatch(file, row + 1, batch)
            row += batch.num_rows
    except pa.ArrowException as error:
        raise UserError(f"{file.name}: after row {row}: cannot be read: {error}") from None


def _record_batches(reader: parquet.ParquetFile) -> Iterator[pa.RecordBatch]:
    """Batches of at most BATCH_ROWS rows and about BATCH_BYTES."""
    metadata = reader.metadata
    groups = range(metadata.num_row_groups)
    size = sum(metadata.row_group(group).total_byte_size for group in groups)
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES * max(1, metadata.num_rows) // max(1, size)))
    # Arrow cannot read a dictionary nested in another type across row groups.
    nested = any(map(_has_nested_dictionary, reader.schema_arrow.types))
    runs: Iterable[list[int]] = ([group] for group in groups) if nested else [list(groups)]
    return chain.from_iterable(reader.iter_batches(batch_size=rows, row_groups=run) for run in runs)


def _has_nested_dictionary(kind: pa.DataType) -> bool:
    children = [kind.field(i).type for i in range(kind.num_fields)]
    return any(pa.types.is_dictionary(c) or _has_nested_dictionary(c) for c in children)


def _refuse_far_int96(file: SourceFile, reader: parquet.ParquetFile) -> None:
    """Raise UserError for INT96 timestamps that would overflow Arrow's nanoseconds."""
    leaves = [reader.schema.column(i) for i in range(len(reader.schema))]
    names = sorted({leaf.path.split(".")[0] for leaf in leaves if leaf.physical_type == "INT96"})
    if not names:
        return
    coarse = parquet.ParquetFile(file.open(), coerce_int96_timestamp_unit="us")
    for batch in coarse.iter_batches(batch_size=BATCH_ROWS, columns=names):
        for name in names:
            if any(_is_far(leaf) for leaf in _timestamps(batch.column(name))):
                raise UserError(
                    f"{file.name}: column {name!r} has INT96 timestamps before 1678 or after 2261, "
                    "which nanoseconds cannot hold; store it as timestamp in microseconds"
                )


def _is_far(column: pa.Array) -> bool:
    ends = compute.min_max(column.view(pa.int64())).as_py()
    return any(abs(end) >= _NS_RANGE_US for end in ends.values() if end is not None)


def _timestamps(column: pa.Array) -> Iterator[pa.Array]:
    """The timestamp columns nested in a column, or the column itself."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        yield column
    elif pa.types.is_struct(kind):
        yield from chain.from_iterable(map(_timestamps, column.flatten()))
    elif pa.types.is_map(kind):
        yield from chain.from_iterable(map(_timestamps, (column.keys, column.items)))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _timestamps(column.flatten())


def _is_readable(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _first_duplicate(names: Iterable[str]) -> str | None:
    """The first duplicate name."""
    return next((name for name, count in Counter(names).items() if count > 1), None)
