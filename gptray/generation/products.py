"""x W^T + b with the weight packed once, in the form that is fastest for a few rows of x.

On a CPU through oneDNN, whose packed layout reads the weight at the memory's speed; elsewhere
PyTorch's own. A row of the result depends on that row of x alone, and on no other.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

# Up to this many inputs oneDNN sums a row in the same order whatever the number of rows.
ONE_ROW_WIDTH = 1024


class Product(Protocol):
    """x (N, in) -> x W^T + b (N, out), through GPT-2's GELU or plus `add` (N, out)."""

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor: ...


def product(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, gelu: bool = False
) -> Product:
    """The product with weight (out, in) and bias (out,), fp32 masters, computed in `dtype`."""
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if weight.device.type == "cpu" and _has_onednn(dtype):
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
        self._bias = bias
        self._after: tuple[str, list[float], str] = (
            ("gelu", [], "tanh") if gelu else ("none", [], "")
        )
        # A single row of a long sum is added up in another order than the same row among others.
        self._never_alone = weight.size(1) > ONE_ROW_WIDTH

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        rows = x.size(0)
        if self._never_alone and rows == 1:
            x = F.pad(x, (0, 0, 0, 1))
            add = None if add is None else F.pad(add, (0, 0, 0, 1))
        y: Tensor
        if add is None:
            y = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, *self._after)
        else:
            y = torch.ops.mkldnn._linear_pointwise.binary(x, add, self._weight, self._bias, "add")
        return y[:rows]


def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN's linear layer computes in `dtype` on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
