"""Whether two GPUs of the cluster can add up a number: NCCL, the driver and the network between."""

from __future__ import annotations

import socket
from datetime import timedelta

from gptray.hub import first_line

# Seconds to get two GPUs, which other jobs may hold, and for them to find each other.
DEADLINE_S = 120.0
MEET_S = 60.0


def two_gpus_add_up(*, backend: str = "nccl", on_gpus: bool = True) -> str:
    """Add up a number over two processes, on two nodes where there are two; "" or what failed.

    on_gpus: each has a GPU. Needs Ray.
    """
    import ray

    member = ray.remote(Member).options(
        num_cpus=0, num_gpus=int(on_gpus), scheduling_strategy="SPREAD"
    )
    members = [member.remote(), member.remote()]
    try:
        meeting = ray.get(members[0].meeting_point.remote(), timeout=DEADLINE_S)
        sums = [one.add_up.remote(backend, meeting, rank) for rank, one in enumerate(members)]
        found = ray.get(sums, timeout=DEADLINE_S)
    except ray.exceptions.GetTimeoutError:
        return f"no answer within {DEADLINE_S:.0f} s; other jobs may hold the GPUs"
    except ray.exceptions.RayError as error:
        return first_line(error)
    finally:
        for one in members:
            ray.kill(one)
    return next((problem for problem in found if problem), "")


class Member:
    """One of the two processes."""

    def meeting_point(self) -> str:
        """An address of this node at which nothing listens."""
        import ray

        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return f"tcp://{address}:{probe.getsockname()[1]}"

    def add_up(self, backend: str, meeting: str, rank: int) -> str:
        """Add 1 to the other's 1; "" or what failed."""
        import torch
        from torch import distributed

        try:
            distributed.init_process_group(
                backend, meeting, timedelta(seconds=MEET_S), world_size=2, rank=rank
            )
            number = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
            distributed.all_reduce(number)
            distributed.destroy_process_group()
        except Exception as error:  # whatever CUDA, NCCL or the network have to say
            return first_line(error)
        return "" if number.item() == 2 else f"1 + 1 = {number.item()}"
