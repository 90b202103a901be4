"""Files that appear whole or not at all, what is said where there is no room, and digests."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gptray.config import RunFailed


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Guard whatever writes to `path`: a full disk, a lost mount, a quota.

    Raises RunFailed, which names the path, the reason and the bytes that are free there.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"cannot write {path}: {_reason(error)} ({_room(path)})") from error


def _reason(error: Exception) -> str:
    """Why, in a few words: shutil.Error lists a (source, target, reason) for each file."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        return str(error.args[0][0][-1])
    return getattr(error, "strerror", None) or str(error)


def _room(path: Path) -> str:
    there = next((one for one in (path, *path.parents) if one.exists()), None)
    try:
        return f"{shutil.disk_usage(there or '/').free:,} bytes free"
    except OSError:
        return "the disk cannot be asked for its free space"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, moved to `path` if all went well."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes its files private
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
