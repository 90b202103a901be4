"""Reads small files that may be damaged or come from others.

A pipe or a device in place of a file cannot block the reader. Invalid, deeply nested or non-finite
JSON is reported in one clause.
"""

from __future__ import annotations

import json
import os
from io import BufferedReader
from pathlib import Path
from typing import NoReturn, TypeGuard

from gptray.config import UserError
from gptray.storage.files import is_storage, open_regular

# The largest config or manifest.
MAX_BYTES = 64 << 20


class Unreadable(ValueError):
    """A file with invalid contents. The message says why; the caller adds the path."""


class Locked(Unreadable):
    """A file that this user may not read, whatever its contents."""


def open_stored(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises FileNotFoundError; Unreadable for a folder, a pipe, a device or a file that cannot be
    opened; Locked for a file that this user may not read; OSError if the storage failed.
    """
    try:
        return BufferedReader(open_regular(path))
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise Locked(error.strerror) from None
    except OSError as error:
        if is_storage(error):
            raise
        raise Unreadable(error.strerror) from None


def read_bytes(path: Path, *, most: int | None = MAX_BYTES) -> bytes:
    """The contents of a regular file of at most `most` bytes. Raises as `open_stored` does."""
    with open_stored(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise Unreadable(f"it is too large ({size:,} bytes)")
        return file.read()


def parse_json(raw: bytes, *, finite: bool = True) -> object:
    """Parse JSON in UTF-8.

    finite: refuse NaN and Infinity, which only other programs' files may have. Raises Unreadable.
    """
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_refuse if finite else None)
    except RecursionError:
        raise Unreadable("not JSON: nested too deeply") from None
    except ValueError as error:
        raise Unreadable(f"not JSON: {error}") from None


def read_object(
    path: Path, *, finite: bool = True, most: int | None = MAX_BYTES
) -> dict[str, object]:
    """The JSON object in a file. Raises as `read_bytes` and `parse_json` do."""
    value = parse_json(read_bytes(path, most=most), finite=finite)
    if not isinstance(value, dict):
        raise Unreadable("not a JSON object")
    return value


def read_foreign(path: Path) -> dict[str, object]:
    """The JSON object in another program's file. Raises UserError, naming the file."""
    try:
        return read_object(path, finite=False)
    except (Unreadable, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def is_whole(value: object, *, least: int = 0) -> TypeGuard[int]:
    """Whether a JSON value is an integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} in it")
