"""x W^T + b with the weight packed once, in the form that is fastest for a few rows of x.

On a CPU through oneDNN, whose packed layout reads the weight at the memory's speed; elsewhere
PyTorch's own. A row of the result depends on that row of x alone, and on no other. To a compiler
oneDNN's products are closed boxes; what stands around them it may fuse.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.model.precision import has_onednn_linear

# Up to this many inputs oneDNN sums a row in the same order whatever the number of rows.
ONE_ROW_WIDTH = 1024


class Product(Protocol):
    """x (N, in) -> x W^T + b (N, out), through GPT-2's GELU or plus `add` (N, out)."""

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor: ...


def product(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    quantize: str = "none",
    gelu: bool = False,
) -> Product:
    """The product with weight (out, in) and bias (out,), fp32 masters, computed in `dtype`.

    quantize "int8" keeps the weight as int8 with a scale for each output; on a CPU only.
    """
    if quantize == "int8":
        return _Int8(weight, bias, dtype, gelu=gelu)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if weight.device.type == "cpu" and has_onednn_linear(dtype):
        return _Packed(weight, bias, gelu=gelu)
    return _Dense(weight, bias, gelu=gelu)


class _Dense:
    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool) -> None:
        self._weight, self._bias, self._gelu = weight, bias, gelu

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        y = F.linear(x, self._weight, self._bias)
        if self._gelu:
            y = F.gelu(y, approximate="tanh")
        return y if add is None else y + add


class _Packed:
    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias, self._gelu = bias, gelu
        # A single row of a long sum is added up in another order than the same row among others.
        self._never_alone = weight.size(1) > ONE_ROW_WIDTH

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        rows = x.size(0)
        if self._never_alone and rows == 1:
            x = F.pad(x, (0, 0, 0, 1))
            add = None if add is None else F.pad(add, (0, 0, 0, 1))
        linear = _opaque.packed_linear if torch.compiler.is_compiling() else _packed_linear
        y: Tensor = linear(x, self._weight, self._bias, add, self._gelu)
        return y[:rows]


def _packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, gelu: bool
) -> Tensor:
    y: Tensor
    if add is not None:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")
    elif gelu:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
    else:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


class _Int8:
    """int8 weights by rows of x made int8, each with a scale of its own; sums are exact integers.

    Dettmers et al. 2022, LLM.int8.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, gelu: bool
    ) -> None:
        self._scale = weight.abs().amax(1).clamp_min(1e-12) / 127
        rounded = (weight / self._scale[:, None]).round().to(torch.int8)  # (out, in)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zero = torch.zeros(weight.size(0), dtype=torch.int64)
        self._bias = torch.zeros(weight.size(0)) if bias is None else bias.float()
        self._dtype, self._gelu = dtype, gelu

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        x = x.float()
        scale = x.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        # Unsigned, with 128 for zero: the only kind that the processor multiplies fast.
        rounded = (x / scale).round_().add_(128).to(torch.uint8)
        linear = _opaque.int8_linear if torch.compiler.is_compiling() else _int8_linear
        y: Tensor = linear(rounded, self._weight, self._scale, self._zero)
        y = torch.addcmul(self._bias, y, scale)
        if self._gelu:
            y = F.gelu(y, approximate="tanh")
        return (y if add is None else y + add).to(self._dtype)


def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, weight, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


# oneDNN's packed weights are tensors of a kind of their own.
_KINDS = ("CPU", "MkldnnCPU")
torch.library.define(
    "gptray::packed_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? add, bool gelu) -> Tensor",
)
torch.library.define(
    "gptray::int8_linear", "(Tensor x, Tensor weight, Tensor scale, Tensor zero) -> Tensor"
)
torch.library.impl("gptray::packed_linear", _KINDS, _packed_linear)
torch.library.impl("gptray::int8_linear", _KINDS, _int8_linear)
_opaque = torch.ops.gptray


@torch.library.register_fake("gptray::packed_linear")  # type: ignore[untyped-decorator]
def _packed_linear_shape(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, gelu: bool
) -> Tensor:
    return x.new_empty(x.size(0), weight.size(0))


@torch.library.register_fake("gptray::int8_linear")  # type: ignore[untyped-decorator]
def _int8_linear_shape(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return scale.new_empty(x.size(0), scale.size(0))
