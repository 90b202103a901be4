"""The process group of CPU workers, met through Ray Train.

Ray's own torch backend would do it too, and does for GPUs (nccl); but it imports torch in the
driver and in the controller, one after the other: four of the twenty seconds of a start.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import ray.train
import ray.train.collective
import ray.util
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

TIMEOUT = timedelta(minutes=30)


@contextmanager
def process_group() -> Iterator[None]:
    """Be in torch.distributed's group of all workers; one worker alone needs none.

    The group is left only where the block ends well: after a failure of one worker the others
    could wait for it, and Ray ends their processes.
    """
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    if size == 1 or dist.is_initialized():
        yield
        return
    store = _store(rank, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    yield
    dist.destroy_process_group()


def _store(rank: int, size: int) -> TCPStore:
    """The group's key-value store, on the first worker's node, at a port that is free there."""
    if rank == 0:
        host = ray.util.get_node_ip_address()
        # By default it would listen on every network of the node.
        listener = socket.create_server((host, 0), family=_family(host))
        store = TCPStore(
            host,
            listener.getsockname()[1],
            size,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        ray.train.collective.broadcast_from_rank_zero((host, store.port))
        return store
    host, port = ray.train.collective.broadcast_from_rank_zero(None)
    return TCPStore(host, port, size, is_master=False, timeout=TIMEOUT)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
