"""Quantized weights: integers, and a scale for each group of a row's inputs.

    weight[o, i] = value[o, i] x scale[o, group of i]

int8: values -127 .. 127, one group per row. int4: values -8 .. 7, groups of GROUP inputs. iq4_nl:
the same groups, and values that are denser near 0, as weights are. Scales are fp16; 4-bit scales
may be negative. There is no zero point, so GGUF's Q8_0, Q4_0 and IQ4_NL hold the same numbers, and
so does the symmetric "pack-quantized" format of compressed-tensors for int8 and int4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.model.packed_weights import GROUP, PACKINGS

_INT8_MAX = 127
# The values of iq4_nl, as in GGUF's IQ4_NL.
CODES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Candidates for the value, before rounding, of a group's largest weight in 4 bits; the one that
# rounds the group best is used. They include all values that it can have: see `quantize`.
_ENDS = {
    "int4": (-8.4, -8.0, -7.5, -7.0, -6.6, 6.6, 7.0, 7.5),
    "iq4_nl": (-134.0, -127.0, -119.0, 106.0, 113.0, 120.0),
}
# The 4-bit kinds, with a scale for each group.
IN_GROUPS = tuple(_ENDS)
# A larger value rounds to one of the ends, as the largest weight of a group must.
_ROUNDS_TO_END = {"int4": 6.5, "iq4_nl": 115.5}
# How often to refine the best scale by least squares for the values that it gives.
_REFINEMENTS = 2
# Weights that are rounded at a time, so that intermediate results stay cached.
_AT_ONCE = 1 << 18
# Raise it whenever the same weights quantize differently, so that cached ones are not used.
ROUNDING = 2
# Coefficients of value^0 .. value^4; the rounded polynomial is CODES[value + 8].
IQ4_NL = (1.43, 11.44, -0.0168, 0.08184, 0.001586)


def head_kind(kind: str) -> str:
    """The head's kind if the linear layers have this kind (or "none")."""
    return "int8" if kind in IN_GROUPS else kind


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (out, in) in `kind`, int8, int4 or iq4_nl.

    values: int8 (out, in). For 4 bits (out, in / 2, rounded up), two codes per byte, the first in
        the lower half: for int4 uint8, a code is the value plus 8; for iq4_nl int8, an index of
        CODES.
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
        """The weight with its outputs scaled by `factors` (out,); the values stay the same."""
        if factors is None:
            return self
        return replace(self, scales=(self.scales.float() * factors[:, None]).half())

    def integers(self) -> Tensor:
        """The unpacked values: int8 (out, in)."""
        if self.kind == "int8":
            return self.values
        codes = self.codes()
        if self.kind == "int4":
            return codes.view(torch.int8) - 8
        return torch.tensor(CODES, dtype=torch.int8, device=codes.device)[codes.int()]

    def codes(self) -> Tensor:
        """The unpacked 4-bit codes: uint8 (out, in)."""
        both = self.values.view(torch.uint8)
        return torch.stack((both & 15, both >> 4), dim=-1).flatten(1)[:, : self.inputs]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in), computed exactly in fp32 and rounded once to `dtype`."""
        groups = _grouped(self.integers().float(), self.group) * self.scales.float()[..., None]
        return groups.flatten(1)[:, : self.inputs].to(dtype)


def quantize(weight: Tensor, kind: str, importance: Tensor | None = None) -> QuantizedWeight:
    """Quantize a weight (out, in) to a kind of PACKINGS: nearest values for the best scale tried.

    importance: (in,), above 0, the weight of an input's squared error in 4 bits; None: all equal.
    Quantizing the result of `dequantize` in fp32 gives the same bits, whatever the importance.
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
        most = weight.new_tensor(_INT8_MAX)  # see `_best_scales`
        scales = (weight.abs().amax(1, keepdim=True) / most).half()
        return _nearest(weight, scales, -_INT8_MAX, _INT8_MAX).to(torch.int8), scales
    groups = _grouped(weight, GROUP)
    scales = _best_scales(groups, _grouped(importance[None], GROUP), kind)
    if kind == "iq4_nl":
        return _packed(_nearest_codes(groups, scales), inputs).view(torch.int8), scales[..., 0]
    whole = _nearest(groups, scales, -8, 7)
    return _packed(whole.add_(8).to(torch.uint8), inputs), scales[..., 0]


def _packed(codes: Tensor, inputs: int) -> Tensor:
    """Pack codes (out, groups, GROUP) of rows of `inputs`, two per byte."""
    filled = F.pad(codes.flatten(1)[:, :inputs], (0, inputs % 2), value=8)
    pairs = filled.view(len(codes), -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def _best_scales(groups: Tensor, importance: Tensor, kind: str) -> Tensor:
    """4-bit scales (out, groups, 1) with a small squared error, for groups (out, groups, GROUP).

    importance: (1, groups, GROUP). Starts from the best of _ENDS, then alternates between the
    values for a scale and the best scale for those values (Lloyd 1982).
    """
    greatest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    # Tensors, not Python numbers: a GPU would multiply by reciprocals and round differently.
    ends = groups.new_tensor(_ENDS[kind]).unbind()
    best = (greatest / ends[0]).half()
    least = torch.full_like(best, torch.inf, dtype=torch.float64)
    for end in ends:
        best, least = _better(groups, importance, (greatest / end).half(), best, least, kind)
    most = greatest.abs() / _ROUNDS_TO_END[kind]
    for _ in range(_REFINEMENTS):
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
    """The better scale of each group: one of these, or the best so far with the `least` error.

    Sums are in fp64, so that their order does not matter.
    """
    near = _nearest_values(groups, scales, kind)
    error = near.mul_(scales).sub_(groups).square_().mul_(importance)
    error = error.sum(-1, True, dtype=torch.float64)
    return torch.where(error < least, scales, best), torch.minimum(error, least)


def _nearest_values(groups: Tensor, scales: Tensor, kind: str) -> Tensor:
    """The 4-bit values, as fp32, that are nearest when multiplied by the scales."""
    if kind == "int4":
        return _nearest(groups, scales, -8, 7)
    values = torch.tensor(CODES, dtype=torch.float32, device=groups.device)
    return values[_nearest_codes(groups, scales).int()]


def _nearest_codes(numbers: Tensor, scales: Tensor) -> Tensor:
    """Indices of CODES, uint8, whose values are nearest when multiplied by the scales."""
    # A table over twice the value, because borders between neighbours are multiples of 1/2.
    borders = [first + second for first, second in zip(CODES, CODES[1:], strict=False)]
    least, most = 2 * CODES[0], 2 * CODES[-1]
    table = torch.bucketize(torch.arange(least, most + 1), torch.tensor(borders), right=True)
    scales = scales.float()
    twice = torch.where(scales == 0, scales, 2 * scales.reciprocal())
    place = (numbers * twice).floor_().clamp_(least, most).sub_(least)
    # Any code will do for a number that is not finite: its scale is not finite either.
    place = place.nan_to_num_(nan=0.0).int()
    return table.to(device=numbers.device, dtype=torch.uint8)[place]


def _nearest(numbers: Tensor, scales: Tensor, least: int, most: int) -> Tensor:
    """The integers that are nearest when multiplied by the scales; 0 if a scale is 0."""
    scales = scales.float()
    inverse = torch.where(scales == 0, scales, scales.reciprocal())
    return (numbers * inverse).round_().clamp_(least, most)


def _grouped(rows: Tensor, group: int) -> Tensor:
    """Rows (out, in) as (out, groups, group), the last group padded with zeros."""
    padded = F.pad(rows, (0, -rows.size(1) % group))
    return padded.view(len(rows), -1, group)
