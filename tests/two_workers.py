"""Two worker processes of a test that form a group, as Ray Train's do, and never outlive it."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import start_processes

LIMIT_S = 240
PRELOADED = ["pytest", "transformers.models.auto.modeling_auto", "tests.training.runs"]


def two_workers(work: Callable[..., None], *given: object, backend: str = "gloo") -> None:
    """Call `work(rank, *given)` in two processes of one thread each; with NCCL, on a GPU each.

    They are forks of a process that has imported what trains, once for the test session: imports
    take seconds. A process that hangs prints the stacks of its threads and ends, and with it the
    other.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # A fork has the environment of when the first was made.
    rest = (store.port, backend, dict(os.environ), work, given)
    start_processes(_worker, rest, nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]


def _worker(
    rank: int,
    port: int,
    backend: str,
    environment: dict[str, str],
    work: Callable[..., None],
    given: tuple[object, ...],
) -> None:
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=2)
    work(rank, *given)
    dist.destroy_process_group()
