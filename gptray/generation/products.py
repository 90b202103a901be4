"""x W^T + b with the weight packed once, for a few rows of x at a time.

On CPUs through oneDNN, whose packed layout reads the weight at memory speed; elsewhere through
PyTorch. A row of the result depends only on that row of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.generation.weight_only import GpuWeight, Tile, for_gpu, multiply
from gptray.model.layers import activation
from gptray.model.precision import has_onednn, has_onednn_linear
from gptray.model.quantized import QuantizedWeight, quantize

# oneDNN's names of activations, with the arguments that follow.
_POINTWISE: dict[str, tuple[str, list[float], str]] = {
    "gelu_new": ("gelu", [], "tanh"),
    "gelu": ("gelu", [], "none"),
    "relu": ("relu", [], ""),
}
# Up to this many inputs, oneDNN sums a row in the same order whatever the number of rows.
ONE_ROW_WIDTH = 1024


class Product(Protocol):
    """x (N, in) -> x W^T + b (N, out), plus `add` (N, out), through an activation if it has one."""

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor: ...


def product(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    quantized: str = "none",
    importance: Tensor | None = None,
    factors: Tensor | None = None,
    kind: str | None = None,
) -> Product:
    """The product with weight (out, in) and bias (out,), both fp32, computed in `dtype`.

    kind: "gelu_new", "gelu" or "relu", as in `gptray.model.layers.activation`; None: no activation.
    quantized: "none", or how `gptray.model.quantized` quantizes the weight, given the importance
    (in,) of its inputs. factors: (out,), scale the weight's outputs, after rounding if it is
    quantized.
    """
    if quantized != "none":
        kept = quantize(weight, quantized, importance).times(factors)
        if quantized == "int8" and weight.device.type == "cpu" and has_onednn():
            return _Int8(kept, bias, dtype, kind=kind)
        bias = None if bias is None else bias.to(dtype)
        return WeightOnly(for_gpu(kept, dtype), bias, dtype, kind)
    weight = weight if factors is None else weight * factors[:, None]
    return _dense(weight.to(dtype), None if bias is None else bias.to(dtype), kind=kind)


def _dense(weight: Tensor, bias: Tensor | None, *, kind: str | None) -> Product:
    """The product in the dtype of its weight."""
    dtype = weight.dtype
    if weight.device.type == "cpu" and has_onednn_linear(dtype):
        return _Packed(weight, bias, kind=kind)
    return _Dense(weight, bias, kind=kind)


class _Dense:
    def __init__(self, weight: Tensor, bias: Tensor | None, *, kind: str | None) -> None:
        self._weight, self._bias, self._kind = weight, bias, kind

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return _finished(F.linear(x, self._weight, self._bias), add, self._kind)


def _finished(y: Tensor, add: Tensor | None, kind: str | None) -> Tensor:
    if add is not None:
        y = y + add
    return activation(y, kind) if kind else y


class _Packed:
    def __init__(self, weight: Tensor, bias: Tensor | None, *, kind: str | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias, self._kind = bias, kind
        # Beyond this, oneDNN sums a single row in another order than the same row among others.
        self._pads_one_row = weight.size(1) > ONE_ROW_WIDTH

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        rows = x.size(0)
        if self._pads_one_row and rows == 1:
            x = F.pad(x, (0, 0, 0, 1))
            add = None if add is None else F.pad(add, (0, 0, 0, 1))
        weight, bias = self._weight, self._bias
        y: Tensor
        if add is not None:
            y = torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")
            y = activation(y, self._kind) if self._kind else y
        elif self._kind:
            y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, *_POINTWISE[self._kind])
        else:
            y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y[:rows]


@dataclass
class WeightOnly:
    """A product with quantized weights; x is not quantized.

    tile: of the kernel that multiplies up to `rows` rows by the quantized weights directly; for
    more rows, or without a tile, every call expands them. See `gptray.generation.weight_only`.
    """

    weight: QuantizedWeight | GpuWeight
    bias: Tensor | None
    dtype: torch.dtype
    kind: str | None
    tile: Tile | None = None
    rows: int = 0

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        if self.tile and len(x) <= self.rows:
            assert isinstance(self.weight, GpuWeight)
            return _finished(multiply(x, self.weight, self.bias, self.tile), add, self.kind)
        return _dense(self.weight.dequantize(self.dtype), self.bias, kind=self.kind)(x, add)


class _Int8:
    """int8 weights by x quantized to int8 row by row; sums are exact integers.

    Dettmers et al. 2022, LLM.int8.
    """

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, *, kind: str | None
    ) -> None:
        self._scale = weight.scales[:, 0].float()
        outputs = len(self._scale)
        self._weight = torch.ops.onednn.qlinear_prepack(weight.values, None)
        self._zero = torch.zeros(outputs, dtype=torch.int64)
        self._bias = torch.zeros(outputs) if bias is None else bias.float()
        self._dtype, self._kind = dtype, kind

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        x = x.float()
        scale = x.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        # Unsigned with a zero point of 128: the only kind that processors multiply fast.
        rounded = (x / scale).round_().add_(128).to(torch.uint8)
        weight, zero = self._weight, self._zero
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(rounded, 1.0, 128),  # x, its scale and zero point
            *(weight, self._scale, zero, None),
            *(1.0, 0, torch.float32, "none", [], ""),  # the output's
        )
        y = torch.addcmul(self._bias, y, scale)
        return _finished(y, add, self._kind).to(self._dtype)
