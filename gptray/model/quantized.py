"""Quantized weights: integers, and a scale for each group of a row's inputs.

    weight[o, i] = value[o, i] x scale[o, group of i]

int8: values -127 .. 127, one group a row. int4: values -8 .. 7, groups of GROUP inputs. iq4_nl: as
many groups, and values that lie the closer the nearer they are to 0, as weights do. Scales are
fp16, and those of 4 bits may be negative. Nothing is added to a product, so that GGUF's Q8_0, Q4_0
and IQ4_NL hold the same numbers, and of int8 and int4 the "pack-quantized" form of
compressed-tensors, symmetric in groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.model.packed_weights import GROUP, PACKINGS

_INT8_MOST = 127
# The values of iq4_nl; those of GGUF's IQ4_NL.
CODES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# What the greatest weight of a group becomes in 4 bits, before it is rounded: whichever of them
# rounds the group best. All that it can be in the end are among them: see `quantize`.
_ENDS = {
    "int4": (-8.4, -8.0, -7.5, -7.0, -6.6, 6.6, 7.0, 7.5),
    "iq4_nl": (-134.0, -127.0, -119.0, 106.0, 113.0, 120.0),
}
# Kinds of 4 bits, with a scale for each group.
IN_GROUPS = tuple(_ENDS)
# What is greater than this becomes such an end.
_BEFORE_ENDS = {"int4": 6.5, "iq4_nl": 115.5}
# How often the best scale is refined: the values that it gives have a better one.
_MENDED = 2
# Weights that are rounded at a time: what is made of them meanwhile stays near.
_AT_ONCE = 1 << 18
# To be raised where the same weights become other numbers, so that none that are kept are taken.
ROUNDING = 2
# Factors of value^0 .. value^4 that give, rounded, CODES[value + 8].
IQ4_NL = (1.43, 11.44, -0.0168, 0.08184, 0.001586)


def head_kind(kind: str) -> str:
    """What the head is kept in where the linear layers are in `kind`, or "none"."""
    return "int8" if kind in IN_GROUPS else kind


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (out, in) in `kind`, int8, int4 or iq4_nl.

    values: int8 (out, in). Of 4 bits (out, in / 2, rounded up), two codes in a byte, the first in
    the lower half: of int4 uint8, each a value plus 8; of iq4_nl int8, each a place in CODES.
    scales: fp16 (out, groups); the last group may be short.
    """

    kind: str
    inputs: int
    values: Tensor
    scales: Tensor

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.inputs if self.kind == "int8" else GROUP

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
        codes = self.codes()
        if self.kind == "int4":
            return codes.view(torch.int8) - 8
        return torch.tensor(CODES, dtype=torch.int8, device=codes.device)[codes.int()]

    def codes(self) -> Tensor:
        """The codes of 4 bits, one in a byte: uint8 (out, in)."""
        both = self.values.view(torch.uint8)
        return torch.stack((both & 15, both >> 4), dim=-1).flatten(1)[:, : self.inputs]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in), computed in fp32, which holds it exactly, and rounded once."""
        groups = _grouped(self.integers().float(), self.group) * self.scales.float()[..., None]
        return groups.flatten(1)[:, : self.inputs].to(dtype)


def quantize(weight: Tensor, kind: str, importance: Tensor | None = None) -> QuantizedWeight:
    """A weight (out, in) in a kind of PACKINGS: the nearest values for the best scale tried.

    importance: (in,), how much an input's squared error counts in 4 bits, above 0; None: all the
    same. What `dequantize` gives in fp32 comes back to the bit, whatever the importance.
    """
    assert kind in PACKINGS, kind
    if importance is None:
        importance = torch.ones(weight.size(1), device=weight.device)
    rows = max(1, _AT_ONCE // weight.size(1))
    parts = [_quantized(part.float(), kind, importance) for part in torch.split(weight, rows)]
    values, scales = (torch.cat(made) for made in zip(*parts, strict=True))
    return QuantizedWeight(kind, weight.size(1), values, scales)


def _quantized(weight: Tensor, kind: str, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The values and scales of some rows."""
    inputs = weight.size(1)
    if kind == "int8":
        most = weight.new_tensor(_INT8_MOST)  # see `_best_scales`
        scales = (weight.abs().amax(1, keepdim=True) / most).half()
        return _nearest(weight, scales, -_INT8_MOST, _INT8_MOST).to(torch.int8), scales
    groups = _grouped(weight, GROUP)
    scales = _best_scales(groups, _grouped(importance[None], GROUP), kind)
    if kind == "iq4_nl":
        return _packed(_nearest_codes(groups, scales), inputs).view(torch.int8), scales[..., 0]
    whole = _nearest(groups, scales, -8, 7)
    return _packed(whole.add_(8).to(torch.uint8), inputs), scales[..., 0]


def _packed(codes: Tensor, inputs: int) -> Tensor:
    """Codes (out, groups, GROUP) of rows of `inputs`, two in a byte."""
    filled = F.pad(codes.flatten(1)[:, :inputs], (0, inputs % 2), value=8)
    pairs = filled.view(len(codes), -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def _best_scales(groups: Tensor, importance: Tensor, kind: str) -> Tensor:
    """For groups (out, groups, GROUP) scales of 4 bits (out, groups, 1) with a small squared error.

    importance: (1, groups, GROUP). From the best of _ENDS on, values for a scale and the best scale
    for those values take turns (Lloyd 1982).
    """
    greatest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    # Not numbers of Python: a GPU would multiply by their reciprocals, and round otherwise.
    ends = groups.new_tensor(_ENDS[kind]).unbind()
    best = (greatest / ends[0]).half()
    least = torch.full_like(best, torch.inf, dtype=torch.float64)
    for end in ends:
        best, least = _better(groups, importance, (greatest / end).half(), best, least, kind)
    most = greatest.abs() / _BEFORE_ENDS[kind]
    for _ in range(_MENDED):
        near = _nearest_values(groups, best, kind)
        counted = near * importance
        both = (counted * groups).sum(-1, True, dtype=torch.float64)
        refined = (both / counted.mul_(near).sum(-1, True, dtype=torch.float64)).half()
        refined = torch.where(refined.abs() < most, refined, best)
        best, least = _better(groups, importance, refined, best, least, kind)
    return best


def _better(
    groups: Tensor, importance: Tensor, scales: Tensor, best: Tensor, least: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """The better scale of each group, of these and the best so far with the `least` error.

    Sums are in fp64: their order must not show.
    """
    near = _nearest_values(groups, scales, kind)
    error = near.mul_(scales).sub_(groups).square_().mul_(importance)
    error = error.sum(-1, True, dtype=torch.float64)
    return torch.where(error < least, scales, best), torch.minimum(error, least)


def _nearest_values(groups: Tensor, scales: Tensor, kind: str) -> Tensor:
    """The values in 4 bits, fp32, that times the scales are nearest."""
    if kind == "int4":
        return _nearest(groups, scales, -8, 7)
    values = torch.tensor(CODES, dtype=torch.float32, device=groups.device)
    return values[_nearest_codes(groups, scales).int()]


def _nearest_codes(numbers: Tensor, scales: Tensor) -> Tensor:
    """Places in CODES, uint8, whose values times the scales are nearest."""
    # Between neighbours, in halves, which are whole numbers; a table of all of them.
    borders = [first + second for first, second in zip(CODES, CODES[1:], strict=False)]
    least, most = 2 * CODES[0], 2 * CODES[-1]
    table = torch.bucketize(torch.arange(least, most + 1), torch.tensor(borders), right=True)
    scales = scales.float()
    twice = torch.where(scales == 0, scales, 2 * scales.reciprocal())
    place = (numbers * twice).floor_().clamp_(least, most).sub_(least)
    # Of what is not finite any code does: its scale is not finite either.
    place = place.nan_to_num_(nan=0.0).int()
    return table.to(device=numbers.device, dtype=torch.uint8)[place]


def _nearest(numbers: Tensor, scales: Tensor, least: int, most: int) -> Tensor:
    """Whole numbers that times the scales are nearest; 0 where a scale is 0."""
    scales = scales.float()
    inverse = torch.where(scales == 0, scales, scales.reciprocal())
    return (numbers * inverse).round_().clamp_(least, most)


def _grouped(rows: Tensor, group: int) -> Tensor:
    """Rows (out, in) as (out, groups, group), the last group filled up with zeros."""
    padded = F.pad(rows, (0, -rows.size(1) % group))
    return padded.view(len(rows), -1, group)
