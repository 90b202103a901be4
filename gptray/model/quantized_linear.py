"""Frozen linear layers whose weights are kept quantized and expanded one at a time.

Dettmers et al. 2023, QLoRA: gradients pass through such a layer to the adapters beside it and
before it; none is made of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptray.model import frozen_kernels
from gptray.model.autograd_context import FrozenContext
from gptray.model.frozen_layer import FrozenLayer, dequantized
from gptray.model.layers import Linear
from gptray.model.quantized import quantize


class QuantizedLinear(nn.Module):
    """x W^T + b with W (out, in) in `kind`; it has no numbers until `put`.

    weight: on the meta device for good, what `GPT.full_tensor` knows the layer's weight by.
    importance: `quantize`'s, to be set before. native: as `Linear`'s.
    """

    importance: Tensor | None = None

    values: Tensor
    scales: Tensor

    def __init__(self, linear: Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind, self.bias, self.native = kind, linear.bias, linear.native
        self.weight = torch.empty(linear.weight.shape, device="meta")
        row = quantize(self.weight[:1], kind)  # as long as all of them
        self.register_buffer("values", row.values.repeat(self.out_features, 1))
        self.register_buffer("scales", row.scales.repeat(self.out_features, 1))

    def put(self, rows: slice, weight: Tensor) -> None:
        """Hold these numbers as the weight's rows."""
        held = quantize(weight, self.kind, self.importance)
        self.values[rows], self.scales[rows] = held.values, held.scales

    def frozen_layer(self, rows: torch.Size) -> FrozenLayer:
        """As `Linear`'s."""
        return FrozenLayer(self.values, self.scales, self.bias, self.kind)

    def forward(self, x: Tensor) -> Tensor:
        if self.native:
            return frozen_kernels.linear(x, self.frozen_layer(x.shape[:-1]))
        y: Tensor = _Frozen.apply(x, *numbers_of(self), self.bias)  # type: ignore[no-untyped-call]
        return y


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers of a network that keep their weights quantized, by their weights' names."""
    layers = model.named_modules()
    return {f"{name}.weight": one for name, one in layers if isinstance(one, QuantizedLinear)}


def numbers_of(linear: nn.Linear | QuantizedLinear) -> tuple[Tensor, Tensor | None, str]:
    """What a frozen layer holds, as `FrozenLayer` has it: values, scales and kind."""
    if isinstance(linear, QuantizedLinear):
        return linear.values, linear.scales, linear.kind
    return linear.weight, None, "none"


class _Frozen(torch.autograd.Function):
    """The weight is expanded again in the backward pass, not kept for it."""

    @staticmethod
    def forward(
        ctx: FrozenContext,
        x: Tensor,
        values: Tensor,
        scales: Tensor | None,
        kind: str,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(values, scales)
        ctx.kind, ctx.inputs = kind, x.size(-1)
        return F.linear(x, dequantized(values, scales, kind, ctx.inputs, x.dtype), bias)

    @staticmethod
    def backward(ctx: FrozenContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, scales = ctx.saved_tensors
        weight = dequantized(values, scales, ctx.kind, ctx.inputs, grads[0].dtype)
        return torch.matmul(grads[0], weight), None, None, None, None
