"""Weights in few bits: whole numbers, and a scale for each group of a row's inputs.

    weight[o, i] = value[o, i] x scale[o, group of i]

int8: values -127 .. 127, one group a row. int4: values -8 .. 7, groups of GROUP inputs. Scales are
fp16, and those of int4 may be negative. Nothing is added to a product, so that GGUF's Q8_0 and Q4_0
and the "pack-quantized" form of compressed-tensors, symmetric in groups, hold the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.model.packed_weights import GROUP, PACKINGS

_INT8_MOST = 127
# What the greatest weight of an int4 group becomes: whichever of them rounds the others best.
_INT4_MOST = (-8.0, -7.0, 7.0)
# Weights that are rounded at a time: what is made of them meanwhile stays near.
_AT_ONCE = 1 << 18


def head_kind(kind: str) -> str:
    """What the head is kept in where the linear layers are in `kind`, or "none"."""
    return "int8" if kind == "int4" else kind


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (out, in) in `kind`, int8 or int4.

    values: int8 (out, in); of int4 uint8 (out, in / 2, rounded up), two values in a byte, each
    plus 8, the first in the lower half. scales: fp16 (out, groups); the last group may be short.
    """

    kind: str
    inputs: int
    values: Tensor
    scales: Tensor

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return GROUP if self.kind == "int4" else self.inputs

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def times(self, factors: Tensor | None) -> QuantizedWeight:
        """The weight with its outputs times `factors` (out,), in the same values."""
        if factors is None:
            return self
        return replace(self, scales=(self.scales.float() * factors[:, None]).half())

    def integers(self) -> Tensor:
        """The values, one in a byte: int8 (out, in)."""
        if self.kind == "int8":
            return self.values
        both = torch.stack((self.values & 15, self.values >> 4), dim=-1).flatten(1)
        return both[:, : self.inputs].view(torch.int8) - 8

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in), computed in fp32, which holds it exactly, and rounded once."""
        groups = _grouped(self.integers().float(), self.group) * self.scales.float()[..., None]
        return groups.flatten(1)[:, : self.inputs].to(dtype)


def quantize(weight: Tensor, kind: str) -> QuantizedWeight:
    """A weight (out, in) in int8 or int4: the nearest values for the best scale that is tried.

    What `dequantize` gives in fp32 comes back to the bit.
    """
    assert kind in PACKINGS, kind
    rows = max(1, _AT_ONCE // weight.size(1))
    parts = [_quantized(part.float(), kind) for part in torch.split(weight, rows)]
    values, scales = (torch.cat(made) for made in zip(*parts, strict=True))
    return QuantizedWeight(kind, weight.size(1), values, scales)


def _quantized(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The values and scales of some rows."""
    inputs = weight.size(1)
    if kind == "int8":
        scales = (weight.abs().amax(1, keepdim=True) / _INT8_MOST).half()
        return _nearest(weight, scales, -_INT8_MOST, _INT8_MOST).to(torch.int8), scales
    groups = _grouped(weight, GROUP)
    scales = _best_scales(groups)
    whole = _nearest(groups, scales[..., None], -8, 7).flatten(1)[:, :inputs]
    pairs = F.pad(whole, (0, inputs % 2)).add_(8).to(torch.uint8).view(len(weight), -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4, scales


def _best_scales(groups: Tensor) -> Tensor:
    """For groups (out, groups, GROUP) the scales (out, groups) with the least squared error."""
    at = groups.abs().argmax(-1, keepdim=True)
    greatest = groups.gather(-1, at)
    best = least = torch.empty(0)
    for most in _INT4_MOST:
        scales = (greatest / most).half()
        error = (_nearest(groups, scales, -8, 7).mul_(scales) - groups).square_().sum(-1)
        if not len(best):
            best, least = scales[..., 0], error
            continue
        better = error < least
        best, least = torch.where(better, scales[..., 0], best), torch.where(better, error, least)
    return best


def _nearest(numbers: Tensor, scales: Tensor, least: int, most: int) -> Tensor:
    """Whole numbers that times the scales are nearest; 0 where a scale is 0."""
    scales = scales.float()
    inverse = torch.where(scales == 0, scales, scales.reciprocal())
    return (numbers * inverse).round_().clamp_(least, most)


def _grouped(rows: Tensor, group: int) -> Tensor:
    """Rows (out, in) as (out, groups, group), the last group filled up with zeros."""
    padded = F.pad(rows, (0, -rows.size(1) % group))
    return padded.view(len(rows), -1, group)
