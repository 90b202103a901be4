"""The data-parallel workers of a run in torch.distributed; a single one needs no group."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from gptray.config import RunFailed, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """This worker's `rank` among `size` workers."""

    rank: int
    size: int

    @classmethod
    def current(cls) -> Workers:
        """The group that this process belongs to."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls(0, 1)

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum over all workers, the same bits on each."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def passes(self, own: int) -> int:
        """How many forward passes a worker makes that has `own` to make."""
        return own

    def gather(self, own: T) -> list[T]:
        """What every worker has, by rank."""
        if self.size == 1:
            return [own]
        found: list[T | None] = [None] * self.size
        dist.all_gather_object(found, own)
        return cast(list[T], found)

    def all_or_none(self, make: Callable[[], T]) -> T:
        """What `make` gives. Raises UserError or RunFailed on every worker if it does on one.

        So all leave together, and none waits for another.
        """
        failure: UserError | RunFailed | None = None
        try:
            made = make()
        except (UserError, RunFailed) as error:
            failure = error
        for one in self.gather(failure):
            if one:
                raise one
        return made

    def from_first(self, make: Callable[[], T]) -> T | None:
        """Call `make` on the first worker; give there what it gives, None elsewhere.

        Raises UserError or RunFailed on every worker, as it did on the first.
        """
        return self.all_or_none(lambda: make() if self.is_first else None)

    def shared_from_first(self, make: Callable[[], T]) -> T:
        """As `from_first`, and give it on every worker: what can be pickled."""
        return cast(T, self.gather(self.from_first(make))[0])

    def parallel(self, model: nn.Module, reduce_dtype: str) -> nn.Module:
        """The model whose backward pass averages gradients over all workers, as fp32 or bf16."""
        if self.size == 1:
            return model
        # What is frozen on a CPU is memory that processes share, which no broadcast may write to;
        # what is trained beside it all have drawn from the same seed, or read.
        is_shared = any(
            one.device.type == "cpu" and not one.requires_grad for one in model.parameters()
        )
        # Buffers are the same on all workers, and stay so.
        parallel = DistributedDataParallel(
            model,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            init_sync=not is_shared,
        )
        if reduce_dtype == "bf16":
            # By its own name it is refused without CUDA.
            parallel.register_comm_hook(
                None,
                lambda state, bucket: bf16_compress_hook(None, bucket),  # type: ignore[arg-type]
            )
        return parallel

    def reduces_gradients(self, model: nn.Module, now: bool) -> AbstractContextManager[None]:
        """Holds the all-reduce back in all but the last forward and backward pass of a step."""
        if isinstance(model, DistributedDataParallel) and not now:
            return model.no_sync()
        return nullcontext()
