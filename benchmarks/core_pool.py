"""A pool of single-threaded processes, one per core, that end with the benchmark."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def core_pool() -> ProcessPoolExecutor:
    """As many single-threaded processes as there are cores."""
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the processes
    spawn = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0))
    return ProcessPoolExecutor(cores, mp_context=spawn, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """End this process as soon as its parent has ended, even if killed."""
    parent = multiprocessing.parent_process()
    assert parent

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
