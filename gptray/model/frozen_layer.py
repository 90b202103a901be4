"""The data of a frozen linear layer: its weight, whole or quantized, and its adapters.

`gptray.model.frozen_kernels` computes with it. Shapes: K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptray.model.packed_weights import PACKINGS
from gptray.model.quantized import QuantizedWeight

# Weights that a CPU dequantizes at a time, so that intermediate results stay in its cache.
_AT_ONCE = 1 << 17
_KINDS = ("none", *PACKINGS)


@dataclass(frozen=True)
class Adapters:
    """The adapters of a layer, one for each span of its outputs.

    a: (P r, K), the A of P adapters of rank r, stacked; b: (adapted outputs, r); both fp32.
    mask: the dropout mask of x, (..., K) bf16, or None.
    """

    a: Tensor
    b: Tensor
    spans: tuple[slice, ...]
    scale: float
    mask: Tensor | None


@dataclass(frozen=True)
class FrozenLayer:
    """A weight, whole in bf16 or as values and scales of a `QuantizedWeight`; a bias in fp32; and
    adapters. kind: the kind of quantization, or "none"."""

    values: Tensor
    scales: Tensor | None
    bias: Tensor | None
    kind: str = "none"
    adapters: Adapters | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors with gradients."""
        return [self.adapters.a, self.adapters.b] if self.adapters else []

    @property
    def constants(self) -> list[Tensor]:
        """The tensors without gradients."""
        mask = self.adapters.mask if self.adapters else None
        return [one for one in (self.values, self.scales, self.bias, mask) if one is not None]

    @property
    def numbers(self) -> list[float]:
        """The numbers from which `read` restores the layer, besides its tensors."""
        has = [float(_KINDS.index(self.kind)), float(self.bias is not None)]
        if not self.adapters:
            return [*has, 0.0]
        bounds = [float(at) for span in self.adapters.spans for at in (span.start, span.stop)]
        is_masked = float(self.adapters.mask is not None)
        return [*has, float(len(self.adapters.spans)), *bounds, self.adapters.scale, is_masked]

    @classmethod
    def read(
        cls, tensors: Iterator[Tensor], constants: Iterator[Tensor], numbers: Iterator[float]
    ) -> FrozenLayer:
        """The next layer in iterators of layers' `tensors`, `constants` and `numbers`."""
        values, kind = next(constants), _KINDS[int(next(numbers))]
        scales = None if kind == "none" else next(constants)
        bias = next(constants) if next(numbers) else None
        count = int(next(numbers))
        if not count:
            return cls(values, scales, bias, kind)
        spans = tuple(slice(int(next(numbers)), int(next(numbers))) for _ in range(count))
        a, b, scale = next(tensors), next(tensors), next(numbers)
        mask = next(constants) if next(numbers) else None
        return cls(values, scales, bias, kind, Adapters(a, b, spans, scale, mask))


def dequantized(
    values: Tensor, scales: Tensor | None, kind: str, inputs: int, dtype: torch.dtype
) -> Tensor:
    """The weight (out, inputs) of `values` and `scales` in `kind`, in `dtype`.

    Without scales, the values are the weight and are returned unchanged.
    """
    if scales is None:
        return values
    whole = values.new_empty(len(values), inputs, dtype=dtype)
    step = max(1, _AT_ONCE // inputs) if values.device.type == "cpu" else len(values)
    for rows in (slice(start, start + step) for start in range(0, len(values), step)):
        whole[rows] = QuantizedWeight(kind, inputs, values[rows], scales[rows]).dequantize(dtype)
    return whole
