"""Weights, gradients and AdamW's moments spread over the workers by PyTorch's FSDP2.

Each worker holds a part of every tensor. A block's weights are gathered only while the block
computes, its gradients only until they are reduced (Rajbhandari et al. 2020, ZeRO; Zhao et al.
2023).
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

# Other workers do without these, which take over a second to load.
if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor

# In place of a tensor's number.
_NOTHING = -1


def shard(model: GPT, device: torch.device, *, reduce_dtype: str, compiled: bool) -> None:
    """Leave this worker its part of each parameter, on the device. Every worker calls it.

    The model computes by `forward` and `token_losses` as before, on all workers at a time.
    compiled: whether its head will be.
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
    # The root's parameters, the embeddings, are not read in the backward pass: the head makes its
    # gradient in the forward pass. Compiled, it may leave that for later.
    model.set_unshard_in_backward(compiled)
    register_fsdp_forward_method(model, "token_losses")


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a worker holds only its part of the tensor."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


@torch.no_grad()
def placed_as(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """A whole tensor of the parameter's shape, placed as that is; of a sharded one, the part."""
    if not is_sharded(parameter):
        return whole.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    whole = whole.to(parameter.device)
    part = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    return torch.empty_like(parameter).copy_(part)  # part is a view of the whole


@dataclass(frozen=True, eq=False)
class ShardedWorkers(Workers):
    """The workers of a sharded run: the first has a tensor whole only while the others help."""

    model: GPT
    optimizer: torch.optim.Optimizer
    device: torch.device

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """A parameter or moment with no part missing; inside `from_first`."""
        for number, one in enumerate(self._sharded()):
            if one is tensor:
                self._ask(number)
                return _full(one)
        return tensor.detach()

    def from_first(self, make: Callable[[], T]) -> T | None:
        """As `Workers.from_first`; meanwhile the others give their parts of what it asks for."""

        def then_release() -> T:
            try:
                return make()
            finally:
                self._ask(_NOTHING)

        if not self.is_first:
            sharded = self._sharded()
            while (number := self._ask(_NOTHING)) != _NOTHING:
                _full(sharded[number])
        return super().from_first(then_release)

    def parallel(self, model: nn.Module, reduce_dtype: str) -> nn.Module:
        """The model as it is: `shard` has made it parallel.

        Gradients are reduced in every pass of a step: to keep them whole would take their memory.
        """
        return model

    def passes(self, own: int) -> int:
        """The most of any worker: blocks are made whole for all workers at a time."""
        most = torch.tensor(own, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most.item())

    def _ask(self, number: int) -> int:
        """The first worker's number, on each worker."""
        value = torch.tensor(number, device=self.device)
        dist.broadcast(value, src=0)
        return int(value.item())

    def _sharded(self) -> list[Tensor]:
        """Parameters and moments, in the same order on each worker."""
        tensors: list[Tensor] = list(self.model.parameters())
        for parameter in self.model.parameters():
            tensors += self.optimizer.state.get(parameter, {}).values()
        return [tensor for tensor in tensors if is_sharded(tensor)]


@torch.no_grad()
def _full(tensor: Tensor) -> Tensor:
    assert is_sharded(tensor)
    return tensor.full_tensor()
