"""How much each input of a linear layer counts when its weights are rounded to 4 bits.

A weight's error reaches the output multiplied by the weight's input, so it counts by the mean
square of that input, which differs a hundredfold between inputs (Lin et al. 2023, AWQ; the
importance matrix of llama.cpp). Random tokens show it nearly as well as text does, so the numbers
depend on the model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from gptray.model.adapter import Base
from gptray.model.gpt import GPT
from gptray.model.layers import Linear
from gptray.model.parameters import stored_parts
from gptray.model.quantized import IN_GROUPS, QuantizedWeight, quantize
from gptray.model.rotary import Angles, Rotary
from gptray.model.rounding import rounded
from gptray.model.stored_weights import StoredModel, StoredWeight
from gptray.model.unread import unread_network

# Makes a weight, transposed where told; raises UserError as `rounded`.
Quantizer = Callable[[StoredWeight, bool], QuantizedWeight]

TOKENS = 256
# Of the mean: the least that an input counts, for text may make more of it.
_LEAST = 2.0**-10


@torch.no_grad()
def input_importance(model: GPT, kind: str) -> dict[str, Tensor]:
    """How much the inputs of each weight (out, in) of the blocks' linear layers count, by its name.

    (in,) in fp32: mean squares over random tokens, about 1 on average. They are computed in fp64
    and rounded to powers of two, so that the order of a sum, which differs between machines, does
    not show. Empty for a `kind` that asks for none. Memory holds one block. Raises UserError as
    `GPT.full_tensor`.
    """
    found = dict[str, Tensor]()
    if kind not in IN_GROUPS:
        return found
    was_training, _ = model.training, model.eval()
    x, angles = _embedded(model)
    for layer, (block, turns) in enumerate(zip(model.transformer.h, angles, strict=True)):
        hooks = [
            module.register_forward_pre_hook(_keeping(found, f"transformer.h.{layer}.{name}"))
            for name, module in block.named_modules()
            if isinstance(module, Linear)
        ]
        own = {name: model.full_tensor(one).double() for name, one in block.named_parameters()}
        x = functional_call(block, own, (x, turns))
        for hook in hooks:
            hook.remove()
    model.train(was_training)
    return found


def base_importance(base: Base, kind: str) -> dict[str, Tensor]:
    """`input_importance` of a base, computed once in a process: a run merges its adapter again
    whenever it is the best so far."""
    return _importance(base.folder, base.sha256, kind) if kind in IN_GROUPS else {}


@lru_cache(1)
def _importance(folder: Path, sha256: str, kind: str) -> dict[str, Tensor]:
    return input_importance(unread_network(folder), kind)


def quantizer(folder: Path, model: StoredModel, kind: str) -> Quantizer:
    """What makes a folder's weights `kind`, by how much their inputs count."""
    counts = dict[StoredWeight, Tensor]()
    if kind in IN_GROUPS:
        found = input_importance(unread_network(folder), kind)
        for part in stored_parts(model.shape, model.family, model.embedding.shape[0]):
            if part.parameter in found and part.is_linear:
                counts[model.weights[part.name]] = found[part.parameter]

    def quantized(stored: StoredWeight, turned: bool) -> QuantizedWeight:
        weight = rounded(stored, torch.float32)
        weight = weight.t().contiguous() if turned else weight
        return quantize(weight, kind, counts.get(stored))

    return quantized


def _embedded(model: GPT) -> tuple[Tensor, Sequence[Angles | None]]:
    """What the first block reads of random tokens, (1, T, C) in fp64, and each block's angles of
    rotary positions."""
    transformer, length = model.transformer, min(TOKENS, model.config.n_positions)
    table = model.full_tensor(transformer.wte.weight)
    random = torch.Generator().manual_seed(0)
    idx = torch.randint(len(table), (1, length), generator=random).to(table.device)
    x = F.embedding(idx, table).double() * model.config.embedding_scale
    if transformer.rotary:
        # The network's own angles are of fp32, in which machines differ.
        rotary = Rotary(model.config, torch.float64)
        return x, rotary.at(torch.arange(length, device=table.device), torch.float64)
    return x + model.full_tensor(transformer.wpe.weight)[:length], [None] * len(transformer.h)


def _keeping(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
    """A hook that keeps how much the inputs of a linear layer count."""

    def keep(_: nn.Module, read: tuple[Tensor]) -> None:
        energy = read[0].flatten(0, -2).square().mean(0)
        shares = energy / energy.mean().log2().round().exp2()
        # Where all inputs are 0, or one is not finite, all count the same.
        shares = shares.nan_to_num(nan=1.0).clamp_min(_LEAST)
        found[f"{name}.weight"] = shares.log2().round().exp2().float()

    return keep
