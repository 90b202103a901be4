"""Prompts out of files, row by row, every column kept; each row says itself if it cannot run.

A text file has a prompt on each line. A file that cannot be read is an error with its name and
line; a row whose prompt is null, empty or no text is not: it keeps its place and its reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from gptray.config import UserError
from gptray.data.corpus import open_parquet
from gptray.data.rows import (
    csv_rows,
    is_text,
    json_object,
    json_rows,
    kind_of,
    no_column,
    text_lines,
)
from gptray.data.sources import SourceFile

BATCH_ROWS = 1024
_SURROGATE = re.compile("[\ud800-\udfff]")

Values = dict[str, Any]


def read_rows(file: SourceFile, prompt_column: str) -> Iterator[tuple[str, Values]]:
    """(place, columns) of every row; the place is file:line, for messages.

    Raises UserError for what cannot be read, and where the first row has no prompt column.
    """
    readers = {
        "txt": _lines, "jsonl": _json_lines, "json": _json, "csv": _csv, "parquet": _parquet
    }  # fmt: skip
    try:
        for number, (place, values) in enumerate(readers[file.format](file, prompt_column)):
            if number == 0 and prompt_column not in values:
                problem = no_column(prompt_column, list(values), key="generate.prompt_column")
                raise UserError(f"{place}: {problem}")
            yield place, values
    except (OSError, EOFError) as error:
        raise UserError(f"{file.name}: cannot be read to its end: {error}") from None


def check_columns(file: SourceFile, prompt_column: str) -> None:
    """Look at the first row only. Raises UserError without the column, or if it holds no text."""
    if file.format == "parquet":
        schema = open_parquet(file).schema_arrow
        kind = schema.field(prompt_column).type if prompt_column in schema.names else pa.null()
        if not is_text(kind) and not pa.types.is_null(kind):
            raise UserError(f"{file.name}: column {prompt_column!r} holds {kind}, not text")
    next(read_rows(file, prompt_column), None)


def prompt_problem(value: Any) -> str | None:
    """Why a prompt cannot run, if it cannot."""
    if value is None:
        return "the prompt is null"
    if not isinstance(value, str):
        return f"the prompt is no text: {kind_of(value)}"
    if _SURROGATE.search(value):
        return "the prompt holds half a surrogate pair"
    return None if value else "the prompt is empty"


def _lines(file: SourceFile, prompt_column: str) -> Iterator[tuple[str, Values]]:
    with file.open() as stream:
        for number, line in enumerate(text_lines(file, stream), start=1):
            yield f"{file.name}:{number}", {prompt_column: line.rstrip("\r\n")}


def _json_lines(file: SourceFile, prompt_column: str) -> Iterator[tuple[str, Values]]:
    with file.open() as stream:
        for number, line in enumerate(text_lines(file, stream), start=1):
            place = f"{file.name}:{number}"
            if not line.strip():
                continue
            try:
                yield place, json_object(line)
            except ValueError as error:
                raise UserError(f"{place}: {error}") from None


def _json(file: SourceFile, prompt_column: str) -> Iterator[tuple[str, Values]]:
    for line, values in json_rows(file):
        yield f"{file.name}:{line}", values


def _csv(file: SourceFile, prompt_column: str) -> Iterator[tuple[str, Values]]:
    rows = csv_rows(file)
    _, header = next(rows, (1, []))
    if len(set(header)) < len(header):
        raise UserError(f"{file.name}:1: a column name is there twice")
    for line, row in rows:
        if row:
            yield f"{file.name}:{line}", dict(zip(header, row, strict=True))


def _parquet(file: SourceFile, prompt_column: str) -> Iterator[tuple[str, Values]]:
    table = open_parquet(file)
    if prompt_column not in table.schema_arrow.names:
        problem = no_column(prompt_column, table.schema_arrow.names, key="generate.prompt_column")
        raise UserError(f"{file.name}: {problem}")
    row = 0
    try:
        for batch in table.iter_batches(batch_size=BATCH_ROWS):
            for values in batch.to_pylist():
                row += 1
                yield f"{file.name}: row {row}", values
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise UserError(f"{file.name}: after row {row}: cannot be read: {error}") from None


@dataclass
class InputScan:
    """What one look at all rows tells: how many, what names them, the type of each column."""

    rows: int = 0
    id_column: str | None = None
    id_type: pa.DataType = field(default_factory=pa.int64)
    types: dict[str, pa.DataType] = field(default_factory=dict)

    def take(self, values: dict[str, list[Any]]) -> None:
        """Widen the columns' types to hold these values; what has no common type becomes text."""
        for name, column in values.items():
            try:
                kind = pa.array(column).type
                before = self.types.get(name, pa.null())
                merged = pa.unify_schemas(
                    [pa.schema([("c", before)]), pa.schema([("c", kind)])],
                    promote_options="permissive",
                )
                self.types[name] = merged.field("c").type
            except (pa.ArrowException, OverflowError):
                self.types[name] = pa.string()


def scan(files: Sequence[SourceFile], prompt_column: str, id_column: str | None) -> InputScan:
    """Look at every row once. `id_column` None: the column id where rows have one, else none.

    Raises UserError for unreadable files, and for an id that is null or there twice.
    """
    result = InputScan(id_column=id_column)
    seen: set[Any] = set()
    whole = True
    for batch in _batches(files, prompt_column):
        if result.rows == 0 and id_column is None and "id" in batch[0][1]:
            result.id_column = "id"
        if result.id_column is not None:
            for place, values in batch:
                name = _id(place, values, result.id_column, seen)
                whole = whole and isinstance(name, int)
        columns: dict[str, list[Any]] = {}
        for _, values in batch:
            for name, value in values.items():
                columns.setdefault(name, []).append(_clean(value))
        result.take(columns)
        result.rows += len(batch)
    if not whole:
        result.id_type = pa.string()
    return result


def staged(
    files: Sequence[SourceFile], prompt_column: str, found: InputScan, rows_per_part: int
) -> Iterator[pa.Table]:
    """The rows in parts: id, prompt, error, then every column under `passed_name`."""
    position, part = 0, []
    for batch in _batches(files, prompt_column):
        for _, values in batch:
            part.append((position, values))
            position += 1
            if len(part) == rows_per_part:
                yield _table(part, prompt_column, found)
                part = []
    if part:
        yield _table(part, prompt_column, found)


OWN_COLUMNS = (
    "id", "prompt", "output", "finish_reason", "prompt_tokens", "output_tokens", "seed", "error",
    "model",
)  # fmt: skip


def passed_name(name: str) -> str:
    """What a column of the input is called in the output: its own name where that is free."""
    return f"input_{name}" if name in OWN_COLUMNS else name


def _table(part: Sequence[tuple[int, Values]], prompt_column: str, found: InputScan) -> pa.Table:
    prompts = [values.get(prompt_column) for _, values in part]
    if found.id_column is None:
        ids: list[Any] = [position for position, _ in part]
    else:
        ids = [values[found.id_column] for _, values in part]
        ids = ids if pa.types.is_integer(found.id_type) else [str(name) for name in ids]
    columns = {
        "id": pa.array(ids, type=found.id_type),
        "prompt": pa.array([_text(prompt) for prompt in prompts], type=pa.string()),
        "error": pa.array([prompt_problem(prompt) for prompt in prompts], type=pa.string()),
    }
    for name, kind in found.types.items():
        if name in ("id", "prompt") and name in (found.id_column, prompt_column):
            continue
        column = [_clean(values.get(name)) for _, values in part]
        if pa.types.is_string(kind):
            column = [_text(value) for value in column]
        columns[passed_name(name)] = pa.array(column, type=kind)
    return pa.table(columns)


def _batches(files: Sequence[SourceFile], prompt_column: str) -> Iterator[list[tuple[str, Values]]]:
    batch = []
    for file in files:
        for row in read_rows(file, prompt_column):
            batch.append(row)
            if len(batch) == BATCH_ROWS:
                yield batch
                batch = []
    if batch:
        yield batch


def _id(place: str, values: Values, column: str, seen: set[Any]) -> Any:
    name = values.get(column)
    if isinstance(name, bool) or not isinstance(name, (int, str)):
        raise UserError(f"{place}: column {column!r} names the row and holds {name!r}")
    if str(name) in seen:
        raise UserError(f"{place}: the id {name!r} in column {column!r} is there twice")
    seen.add(str(name))
    return name


def _text(value: Any) -> str | None:
    """A value as text: itself, or its JSON; what is no text at all is shown as such."""
    if value is None or isinstance(value, str):
        return None if value is None else _SURROGATE.sub("\ufffd", value)
    return json.dumps(_clean(value), ensure_ascii=False, default=str)


def _clean(value: Any) -> Any:
    """The value with halves of surrogate pairs replaced, which no file can hold."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {str(_clean(key)): _clean(item) for key, item in value.items()}
    return value
