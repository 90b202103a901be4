"""Parquet files written atomically: the parts of a large table.

Pages carry checksums. A part's sha256 is kept in a hidden folder next to it, which reveals damage
or another file in its place.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from gptray.config import RunFailed
from gptray.storage.files import replacing, sha256_of, storing
from gptray.storage.stored import Locked, Unreadable, read_bytes

COMPRESSION = "zstd"
SCRATCH = ".gptray"


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def write_whole(table: pa.Table, path: Path) -> None:
    """Write a Parquet file atomically. Raises RunFailed if the disk is full."""
    with storing(path), replacing(path) as partial:
        _write(table, partial)


def read_whole(path: Path) -> pa.Table:
    """Read a table that `write_whole` wrote. Raises RunFailed if it is damaged."""
    try:
        return parquet.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from None


def write_part(table: pa.Table, path: Path) -> None:
    """Write a part atomically, after its sha256. Raises RunFailed if the disk is full."""
    digest = digest_file(path)
    with storing(path), replacing(path) as partial:
        _write(table, partial)
        digest.parent.mkdir(parents=True, exist_ok=True)
        with replacing(digest) as draft:
            draft.write_text(sha256_of(partial), "utf-8")


def part_sha256(path: Path) -> str:
    """A part's sha256. Raises RunFailed if it changed since the part was written."""
    try:
        written = read_bytes(digest_file(path))
        found = sha256_of(path)
    except FileNotFoundError:
        raise _damaged(path, "it was not written by this job") from None
    except (PermissionError, Locked) as error:
        raise RunFailed(f"{path} cannot be read: {error}") from None
    except (OSError, Unreadable) as error:
        raise _damaged(path, f"{error}") from None
    if written != found.encode():
        raise _damaged(path, "its sha256 has changed since it was written")
    return found


def digest_file(path: Path) -> Path:
    """The file with a part's sha256, for parts of the output and of the scratch folder."""
    if path.parent.name == SCRATCH:
        return path.with_name(f"{path.name}.sha256")
    return path.parent / SCRATCH / f"output-{path.stem}.sha256"


def _damaged(path: Path, reason: str) -> RunFailed:
    return RunFailed(f"{path} is damaged: {reason}; delete it and run the same command again")


def _write(table: pa.Table, path: Path) -> None:
    parquet.write_table(table, path, compression=COMPRESSION, write_page_checksum=True)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def unwritable(fields: Iterable[pa.Field]) -> dict[str, str]:
    """By name, the columns that Parquet cannot return unchanged, and why."""
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
            return f"Parquet returns {field.type} as {now.type}; convert it first"
    return None
