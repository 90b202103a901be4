"""Makes OpenMP threads sleep instead of spin at barriers while other processes need their cores.

OpenMP's threads meet at a barrier at the end of every loop. If they have the cores to themselves,
they should spin there: most waits are shorter than waking a thread. But if another process runs on
one of the cores, the last thread may wait for that core for milliseconds while the others spin on
cores that it could use.

GNU's OpenMP spins only briefly once a process has more OpenMP threads than there are cores (see
GOMP_SPINCOUNT in its manual). So while this process's threads wait for cores, which Linux counts,
this module adds sleeping threads. Loops are divided as before, so results keep their bits.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

# Seconds between looks; the average number of waiting threads from which cores count as shared (one
# busy process makes it 1, a quiet machine's services up to 0.1); the quiet looks that end it.
LOOK_S, SHARED_FROM, LOOKS = 0.2, 0.25, 5


@cache
def share_cores() -> CoreSharing | None:
    """Make this process's threads share cores well from now on; torch must be loaded.

    None without GNU's OpenMP or without Linux's counters.
    """
    path = _openmp_path()
    return CoreSharing(ctypes.CDLL(path)) if path and queued_ns() else None


class CoreSharing:
    """Watches for the life of the process whether others need its cores. See `share_cores`."""

    def __init__(self, openmp: ctypes.CDLL) -> None:
        self._openmp = openmp
        self._sleepers: _Sleepers | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="core sharing", daemon=True)
        self._thread.start()
        # Python kills daemon threads at exit in the middle of whatever they do.
        atexit.register(self._end)

    @property
    def is_shared(self) -> bool:
        """Whether others need the cores, so that waiting threads sleep."""
        return self._sleepers is not None

    def _end(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        quiet, before = 0, queued_ns()
        while not self._over.wait(LOOK_S):
            now = queued_ns()
            quiet = 0 if now - before > SHARED_FROM * LOOK_S * 1e9 else quiet + 1
            before = now
            if quiet == 0 and self._sleepers is None:
                self._sleepers = _Sleepers(self._openmp)
            elif quiet == LOOKS:
                self._wake()
        self._wake()

    def _wake(self) -> None:
        if self._sleepers:
            self._sleepers.end()
            self._sleepers = None


class _Sleepers:
    """Sleeping OpenMP threads, one more than cores, in a parallel region of a separate thread."""

    def __init__(self, openmp: ctypes.CDLL) -> None:
        count = openmp.omp_get_num_procs() + 1
        self._barrier = ctypes.create_string_buffer(64)  # at least a pthread_barrier_t
        libc = ctypes.CDLL(None)
        self._meet = libc.pthread_barrier_wait  # not Python, which OpenMP's threads cannot run
        libc.pthread_barrier_init(self._barrier, None, count + 1)
        self._thread = threading.Thread(
            target=openmp.GOMP_parallel,
            args=(self._meet, self._barrier, count, 0),
            name="sleepers",
            daemon=True,
        )
        self._thread.start()

    def end(self) -> None:
        self._meet(self._barrier)
        self._thread.join()


def queued_ns() -> int:
    """Nanoseconds that this process's threads were runnable without a core; 0 if not counted."""
    total = 0
    with suppress(OSError):
        for task in os.listdir("/proc/self/task"):
            with suppress(OSError), open(f"/proc/self/task/{task}/schedstat", "rb") as file:
                total += int(file.read().split()[1])
    return total


def _openmp_path() -> str | None:
    """The file of the GNU OpenMP runtime that torch has loaded, if any."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
            path = line[line.find("/") :]
            if Path(path).name.startswith("libgomp"):
                return path
    return None
