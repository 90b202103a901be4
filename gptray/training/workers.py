"""A run's data-parallel workers in torch.distributed; a single worker needs no process group."""

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
        """The workers of this process's group."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls(0, 1)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the worker that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum over all workers, the same bits on each."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def passes(self, own: int) -> int:
        """How many forward passes this worker must make if it needs `own`."""
        return own

    def gather(self, own: T) -> list[T]:
        """Every worker's value, by rank."""
        if self.size == 1:
            return [own]
        found: list[T | None] = [None] * self.size
        dist.all_gather_object(found, own)
        return cast(list[T], found)

    def all_or_none(self, make: Callable[[], T]) -> T:
        """The result of `make`. Raises UserError or RunFailed on every worker if one raises it.

        So all workers leave together, and none waits for another.
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
        """The result of `make` on the first worker; None on the others, which do not call it.

        Raises UserError or RunFailed on every worker if the first raises it.
        """
        return self.all_or_none(lambda: make() if self.is_first else None)

    def shared_from_first(self, make: Callable[[], T]) -> T:
        """Like `from_first`, but every worker gets the result, which must be picklable."""
        return cast(T, self.gather(self.from_first(make))[0])

    def parallel(self, model: nn.Module, reduce_dtype: str) -> nn.Module:
        """The model, wrapped so that backward averages gradients over workers in fp32 or bf16."""
        if self.size == 1:
            return model
        # On a CPU, processes share the memory of frozen weights, so no broadcast may write to it.
        # Trained weights are already equal: drawn from the same seed, or read from the same file.
        is_shared = any(
            one.device.type == "cpu" and not one.requires_grad for one in model.parameters()
        )
        parallel = DistributedDataParallel(
            model, gradient_as_bucket_view=True, init_sync=not is_shared
        )
        # Buffers are constant, so a forward pass need not send them. As an argument, this is
        # deprecated in torch 2.13, and what replaces it is not in 2.11.
        parallel.broadcast_buffers = False
        if reduce_dtype == "bf16":
            # In a lambda because DDP refuses the hook itself without CUDA.
            parallel.register_comm_hook(
                None,
                lambda state, bucket: bf16_compress_hook(None, bucket),  # type: ignore[arg-type]
            )
        return parallel

    def gradient_sync(self, model: nn.Module, now: bool) -> AbstractContextManager[None]:
        """A context for one forward and backward pass; it all-reduces gradients only if `now`."""
        if isinstance(model, DistributedDataParallel) and not now:
            return model.no_sync()
        return nullcontext()
