"""Parquet files that appear whole or not at all: the parts of a large table."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from gptray.config import RunFailed
from gptray.files import replacing


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def write_whole(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that appears whole or not at all. Raises RunFailed without room."""
    try:
        with replacing(path) as partial:
            parquet.write_table(table, partial, compression="zstd")
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
    except OSError as error:
        raise RunFailed(f"{path}: cannot be written: {error}") from None
