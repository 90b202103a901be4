"""Frozen linear layers whose weights are kept quantized and expanded one at a time.

Dettmers et al. 2023, QLoRA: gradients pass through such a layer to its adapters and to the layers
before it; the weight gets none.
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
    """x W^T + b with W (out, in) in `kind`; `put` sets its values.

    weight: a placeholder that stays on the meta device, by which `GPT.full_tensor` finds the layer.
    importance: for `quantize`; set it before `put`. native: as in `Linear`.
    """

    importance: Tensor | None = None

    values: Tensor
    scales: Tensor

    def __init__(self, linear: Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind, self.bias, self.native = kind, linear.bias, linear.native
        self.weight = torch.empty(linear.weight.shape, device="meta")
        row = quantize(self.weight[:1], kind)  # for the shapes; all rows have the same
        self.register_buffer("values", row.values.repeat(self.out_features, 1))
        self.register_buffer("scales", row.scales.repeat(self.out_features, 1))

    def put(self, rows: slice, weight: Tensor) -> None:
        """Quantize and store rows of the weight."""
        held = quantize(weight, self.kind, self.importance)
        self.values[rows], self.scales[rows] = held.values, held.scales

    def frozen_layer(self, rows: torch.Size) -> FrozenLayer:
        """As in `Linear`."""
        return FrozenLayer(self.values, self.scales, self.bias, self.kind)

    def forward(self, x: Tensor) -> Tensor:
        if self.native:
            return frozen_kernels.linear(x, self.frozen_layer(x.shape[:-1]))
        stored = self.values, self.scales, self.kind
        y: Tensor = _Frozen.apply(x, *stored, self.bias)  # type: ignore[no-untyped-call]
        return y


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a network, by their weights' names."""
    layers = model.named_modules()
    return {f"{name}.weight": one for name, one in layers if isinstance(one, QuantizedLinear)}


class _Frozen(torch.autograd.Function):
    """Expands the weight again in the backward pass instead of saving it."""

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
