"""Memory of the process: keep what is freed for the next tensor instead of giving it back."""

from __future__ import annotations

import ctypes

# glibc's names in malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Let the allocator reuse freed pages; a no-op where the C library is not glibc.

    A step frees and takes the same large tensors again and again. By default glibc returns them
    to the kernel each time, which clears and maps every page again: a tenth of a step on a CPU.
    Process-wide.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, LARGEST_INT)
