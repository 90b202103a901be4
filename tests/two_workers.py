"""Two worker processes of a test that form a group, as Ray Train's do, and never outlive it."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import spawn

LIMIT_S = 240


def two_workers(work: Callable[..., None], *given: object, backend: str = "gloo") -> None:
    """Call `work(rank, *given)` in two processes of one thread each; with NCCL, on a GPU each.

    A process that hangs prints the stacks of its threads and ends, and with it the other.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn(_worker, (store.port, backend, work, given), nprocs=2)  # type: ignore[no-untyped-call]


def _worker(
    rank: int, port: int, backend: str, work: Callable[..., None], given: tuple[object, ...]
) -> None:
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=2)
    work(rank, *given)
    dist.destroy_process_group()
