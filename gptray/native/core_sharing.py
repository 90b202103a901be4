"""Has threads that wait for each other sleep while other processes want their cores.

OpenMP's threads meet at the end of every loop. On cores of their own whoever comes first had best
spin: most of these waits are shorter than waking a thread. Where another process has a core, the
last to come may stand in that core's queue for milliseconds, and the spinning keeps it there: it
could run where the others wait.

GNU's OpenMP spins for a moment only once a process has more of its threads than there are cores
(its manual, GOMP_SPINCOUNT). So while this process's threads stand in queues, as Linux counts
that, some more of them exist, asleep. Loops are shared out as ever: results keep their bits.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

# Seconds between looks; the time in queues, in cores, from which cores are shared (a busy process
# makes it 1, a quiet machine's own services up to 0.1); and so many looks at less end that.
LOOK_S, SHARED_FROM, LOOKS = 0.2, 0.25, 5


@cache
def share_cores() -> CoreSharing | None:
    """Have this process's threads share cores well from now on; torch must be loaded.

    None where there is no GNU OpenMP or no Linux that counts.
    """
    path = _openmp_path()
    return CoreSharing(ctypes.CDLL(path)) if path and queued_ns() else None


class CoreSharing:
    """Watches, for the life of the process, whether it shares its cores. See `share_cores`."""

    def __init__(self, openmp: ctypes.CDLL) -> None:
        self._openmp = openmp
        self._sleepers: _Sleepers | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="core sharing", daemon=True)
        self._thread.start()
        # A thread that still runs as Python ends is torn down in the middle of what it does.
        atexit.register(self._end)

    @property
    def is_shared(self) -> bool:
        """Whether others want the cores, so that waiting threads sleep."""
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
    """More OpenMP threads than there are cores: a region of a thread of its own, all asleep."""

    def __init__(self, openmp: ctypes.CDLL) -> None:
        count = openmp.omp_get_num_procs() + 1
        self._barrier = ctypes.create_string_buffer(64)  # a pthread_barrier_t and more
        libc = ctypes.CDLL(None)
        self._meet = libc.pthread_barrier_wait  # no Python: these threads know none
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
    """Nanoseconds for which threads of this process were ready to run and had no core; 0 where
    the system does not say.
    """
    total = 0
    with suppress(OSError):
        for task in os.listdir("/proc/self/task"):
            with suppress(OSError), open(f"/proc/self/task/{task}/schedstat", "rb") as file:
                total += int(file.read().split()[1])
    return total


def _openmp_path() -> str | None:
    """The file of GNU's OpenMP that torch has loaded."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
            path = line[line.find("/") :]
            if Path(path).name.startswith("libgomp"):
                return path
    return None
