"""Parquet files that appear whole or not at all: the parts of a large table."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from gptray.files import replacing, storing

COMPRESSION = "zstd"


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def write_whole(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that appears whole or not at all. Raises RunFailed without room."""
    with storing(path), replacing(path) as partial:
        parquet.write_table(table, partial, compression=COMPRESSION)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())


def unwritable(fields: Iterable[pa.Field]) -> dict[str, str]:
    """Why `write_whole` cannot give back a column as it is, by name; for those that it cannot."""
    schema = pa.schema(list(fields))
    if _problem(schema) is None:
        return {}
    problems = {field.name: _problem(pa.schema([field])) for field in schema}
    return {name: problem for name, problem in problems.items() if problem is not None}


def _problem(schema: pa.Schema) -> str | None:
    buffer = io.BytesIO()
    try:
        parquet.write_table(schema.empty_table(), buffer, compression=COMPRESSION)
        back = parquet.read_schema(io.BytesIO(buffer.getvalue()))
    except (pa.ArrowException, OSError) as error:
        return f"Parquet cannot hold {', '.join(map(str, schema.types))}: {error}"
    for field, now in zip(schema, back, strict=True):
        if field.type != now.type or field.nullable != now.nullable:
            return f"Parquet gives back {field.type} as {now.type}; convert it first"
    return None
