"""A disk that is full, without root: no file of this process may grow beyond a size (EFBIG)."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


def limit_files(size: int) -> None:
    """No file may grow beyond `size` bytes from now on; -1: any size again."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes in this block."""
    limit_files(size)
    try:
        yield
    finally:
        limit_files(-1)
