"""The importance of each input of a linear layer when its weights are rounded to 4 bits.

A weight's error is multiplied by its input, so it matters in proportion to the mean square of that
input, which differs a hundredfold between inputs (Lin et al. 2023, AWQ; llama.cpp's importance
matrix). Random tokens show it nearly as well as text does, so the importance depends only on the
model.
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

# Quantizes a weight, transposed if the second argument is true; raises UserError as `rounded`.
Quantizer = Callable[[StoredWeight, bool], QuantizedWeight]

TOKENS = 256
# The least importance of an input, relative to the mean: text may use it more.
_LEAST = 2.0**-10


@torch.no_grad()
def input_importance(model: GPT, kind: str) -> dict[str, Tensor]:
    """The importance (in,), fp32, of the inputs of the blocks' linear layers, by weights' names.

    These are mean squares over random tokens, about 1 on average, computed in fp64 and rounded to
    powers of two, so that machines that sum in another order agree. Empty for a `kind` that does
    not use them. Holds one block in memory. Raises UserError as `GPT.full_tensor` does.
    """
    found = dict[str, Tensor]()
    if kind not in IN_GROUPS:
        return found
    was_training, _ = model.training, model.eval()
    x, angles = _embedded(model)
    for layer, (block, turns) in enumerate(zip(model.transformer.h, angles, strict=True)):
        hooks = [
            module.register_forward_pre_hook(_recorder(found, f"transformer.h.{layer}.{name}"))
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
    """`input_importance` of a base, cached because a run merges its adapter at every new best."""
    return _importance(base.folder, base.sha256, kind) if kind in IN_GROUPS else {}


@lru_cache(1)
def _importance(folder: Path, sha256: str, kind: str) -> dict[str, Tensor]:
    return input_importance(unread_network(folder), kind)


def quantizer(folder: Path, model: StoredModel, kind: str) -> Quantizer:
    """The function that quantizes a folder's weights to `kind`, by their inputs' importance."""
    counts = dict[StoredWeight, Tensor]()
    if kind in IN_GROUPS:
        found = input_importance(unread_network(folder), kind)
        for part in stored_parts(model.shape, model.family, model.embedding.shape[0]):
            if part.parameter in found and part.is_linear:
                counts[model.weights[part.name]] = found[part.parameter]

    def quantized(stored: StoredWeight, transposed: bool) -> QuantizedWeight:
        weight = rounded(stored, torch.float32)
        weight = weight.t().contiguous() if transposed else weight
        return quantize(weight, kind, counts.get(stored))

    return quantized


def _embedded(model: GPT) -> tuple[Tensor, Sequence[Angles | None]]:
    """The first block's input for random tokens, (1, T, C) in fp64, and each block's rotary
    angles."""
    transformer, length = model.transformer, min(TOKENS, model.config.n_positions)
    table = model.full_tensor(transformer.wte.weight)
    random = torch.Generator().manual_seed(0)
    idx = torch.randint(len(table), (1, length), generator=random).to(table.device)
    x = F.embedding(idx, table).double() * model.config.embedding_scale
    if transformer.rotary:
        # Not the network's own angles: they are fp32, which differs between machines.
        rotary = Rotary(model.config, torch.float64)
        return x, rotary.at(torch.arange(length, device=table.device), torch.float64)
    return x + model.full_tensor(transformer.wpe.weight)[:length], [None] * len(transformer.h)


def _recorder(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
    """A hook that records the importance of a linear layer's inputs."""

    def record(_: nn.Module, read: tuple[Tensor]) -> None:
        energy = read[0].flatten(0, -2).square().mean(0)
        shares = energy / energy.mean().log2().round().exp2()
        # If all inputs are 0, or one is not finite, all count the same.
        shares = shares.nan_to_num(nan=1.0).clamp_min(_LEAST)
        found[f"{name}.weight"] = shares.log2().round().exp2().float()

    return record
