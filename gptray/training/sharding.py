"""Shards weights, gradients and AdamW's moments over the workers with PyTorch's FSDP2.

Each worker holds a shard of every tensor. A block's weights are gathered only while the block
computes, and its full gradients exist only until they are reduced (Rajbhandari et al. 2020, ZeRO;
Zhao et al. 2023).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptray.model.gpt import GPT
from gptray.training.workers import T, Workers

# These take over a second to import, and unsharded runs do not need them.
if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor

# Instead of a tensor's number: no more tensors are wanted.
_NO_MORE = -1


def shard(model: GPT, device: torch.device, *, reduce_dtype: str, compiled: bool) -> None:
    """Shard each parameter over the workers and put this worker's shard on the device.

    Every worker calls this. `forward` and `token_losses` work as before, if all workers call them
    together. compiled: whether the head will be compiled.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if reduce_dtype == "bf16" else None)
    transformer = model.transformer
    for module in (*transformer.h, transformer.ln_f):
        if next(module.parameters(), None) is not None:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    assert isinstance(model, FSDPModule)
    # The backward pass does not read the root's parameters, the embeddings, because the head
    # computes its gradient in the forward pass. If compiled, it may defer that.
    model.set_unshard_in_backward(compiled)
    register_fsdp_forward_method(model, "token_losses")


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this worker holds only its shard of the tensor."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


@torch.no_grad()
def placed_as(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """A full tensor, moved to the parameter's device and sharded if the parameter is."""
    if not is_sharded(parameter):
        return whole.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    whole = whole.to(parameter.device)
    part = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    return torch.empty_like(parameter).copy_(part)  # `part` is a view


@dataclass(frozen=True, eq=False)
class ShardedWorkers(Workers):
    """The workers of a sharded run: the first can gather a full tensor only if the others help."""

    model: GPT
    optimizer: torch.optim.Optimizer
    device: torch.device

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Gather a parameter or moment in full; call it inside `from_first`."""
        for number, one in enumerate(self._sharded()):
            if one is tensor:
                self._ask(number)
                return _full(one)
        return tensor.detach()

    def from_first(self, make: Callable[[], T]) -> T | None:
        """Like `Workers.from_first`; the others help to gather the tensors that it asks for."""

        def then_release() -> T:
            try:
                return make()
            finally:
                self._ask(_NO_MORE)

        if not self.is_first:
            sharded = self._sharded()
            while (number := self._ask(_NO_MORE)) != _NO_MORE:
                _full(sharded[number])
        return super().from_first(then_release)

    def parallel(self, model: nn.Module, reduce_dtype: str) -> nn.Module:
        """The model itself, which `shard` has made parallel.

        Gradients are reduced in every backward pass: accumulating them unsharded would cost memory.
        """
        return model

    def passes(self, own: int) -> int:
        """The most of any worker, since all workers gather a block's weights together."""
        most = torch.tensor(own, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most.item())

    def _ask(self, number: int) -> int:
        """Broadcast the first worker's number to all workers."""
        value = torch.tensor(number, device=self.device)
        dist.broadcast(value, src=0)
        return int(value.item())

    def _sharded(self) -> list[Tensor]:
        """All sharded parameters and moments, in the same order on each worker."""
        tensors: list[Tensor] = list(self.model.parameters())
        for parameter in self.model.parameters():
            tensors += self.optimizer.state.get(parameter, {}).values()
        return [tensor for tensor in tensors if is_sharded(tensor)]


@torch.no_grad()
def _full(tensor: Tensor) -> Tensor:
    assert is_sharded(tensor)
    return tensor.full_tensor()
