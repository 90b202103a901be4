"""Runs jobs in single-threaded processes, one per core, that end with the benchmark."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from gptray.system import usable_cores

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_on_all_cores(
    run: Callable[[Job], Result], jobs: Iterable[Job]
) -> Iterator[tuple[Job, Result]]:
    """Run jobs, as many at a time as there are cores; yield each with its result as it ends."""
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the processes
    spawn = multiprocessing.get_context("spawn")
    cores = usable_cores()
    pool = ProcessPoolExecutor(cores, mp_context=spawn, initializer=_end_with_parent)
    try:
        runs = {pool.submit(run, job): job for job in jobs}
        for done in as_completed(runs):
            yield runs[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this process as soon as its parent has ended, even if killed."""
    parent = multiprocessing.parent_process()
    assert parent

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
