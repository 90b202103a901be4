"""Rotary positions in GGUF's fields and in Hugging Face's rope_parameters, both ways.

Llama 3's scaling is no field there but a tensor: how many times longer each pair's wavelength is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gptray.config import UserError

# The tensor with Llama 3's scaling, and all fields, after the architecture.
FACTORS = "rope_freqs.weight"
_BASE, _TURNED, _KIND = "rope.freq_base", "rope.dimension_count", "rope.scaling.type"
_FACTOR, _OLD_FACTOR = "rope.scaling.factor", "rope.scale_linear"
_YARN = {
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
ROTARY_KEYS = (_BASE, _TURNED, _KIND, _FACTOR, _OLD_FACTOR, *_YARN.values())
_CONTEXT = "original_max_position_embeddings"
# Of every Llama since 3.1; other contexts are in a field.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192


def rotary_parameters(
    fields: Mapping[str, object], head: int, factors: Sequence[float] | None
) -> dict[str, object]:
    """rope_parameters of config.json.

    fields: GGUF's, by what follows the architecture. head: the width of a head. factors: the
    tensor of Llama 3's scaling. Raises UserError for a scaling that is not known.
    """
    base, turned = fields.get(_BASE, 10000.0), fields.get(_TURNED, head)
    if (
        not isinstance(base, float)
        or not isinstance(turned, int)
        or not (0 < base < math.inf and 0 < turned <= head)
    ):
        raise UserError(f"its {_BASE} and {_TURNED} are no rotation of {head} numbers")
    plain = {"rope_theta": base, "partial_rotary_factor": turned / head}
    kind, factor = fields.get(_KIND), fields.get(_FACTOR, fields.get(_OLD_FACTOR))
    if factors is not None:
        context = fields.get(_YARN[_CONTEXT], _LLAMA3_CONTEXT)
        return {**plain, **_llama3_of(factors, base, turned, context)}
    if kind == "none" or (kind is None and factor in (None, 0.0, 1.0)):
        return {**plain, "rope_type": "default"}
    if kind == "yarn":
        yarn = {name: fields[key] for name, key in _YARN.items() if key in fields}
        return {**plain, "rope_type": "yarn", "factor": factor, **yarn}
    if kind in (None, "linear"):
        return {**plain, "rope_type": "linear", "factor": factor}
    raise UserError(f"its {_KIND} {kind!r:.40} is not supported; none, linear and yarn are")


def rotary_fields(
    base: float, turned: int, scaling: Mapping[str, str | bool | int | float] | None
) -> dict[str, object]:
    """GGUF's fields, by what follows the architecture.

    turned: how much of a head is rotated. scaling: Hugging Face's rope_scaling. Raises UserError
    for what llama.cpp does not compute.
    """
    fields: dict[str, object] = {_BASE: base, _TURNED: turned}
    if not scaling:
        return fields
    kind = scaling["rope_type"]
    if kind == "llama3":
        if any(scaling[name] != number for name, number in _LLAMA3.items()):
            raise UserError("GGUF files have Llama 3's rope_scaling with factors of 1 and 4 alone")
        return fields | {_YARN[_CONTEXT]: int(scaling[_CONTEXT])}
    fields |= {_KIND: kind, _FACTOR: float(scaling["factor"])}
    for name in scaling.keys() - {"rope_type", "factor"}:
        if name not in _YARN:
            raise UserError(f"GGUF files have no {name} of rope_scaling")
        value = scaling[name]
        fields[_YARN[name]] = int(value) if name.startswith("original") else float(value)
    return fields


def llama3_factors(
    base: float, turned: int, scaling: Mapping[str, str | bool | int | float]
) -> list[float]:
    """How many times longer Llama 3's scaling makes each wavelength, (turned / 2,)."""
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context, factor = float(scaling[_CONTEXT]), float(scaling["factor"])
    factors = []
    for pair in range(turned // 2):
        turns = context / (2 * math.pi * base ** (2 * pair / turned))
        kept = (turns - low) / (high - low) if high != low else turns - low
        kept = min(max(kept, 0.0), 1.0)
        factors.append(1 / ((1 - kept) / factor + kept))
    return factors


def _llama3_of(
    factors: Sequence[float], base: float, turned: int, context: object
) -> dict[str, object]:
    """The scaling that has these factors. Raises UserError where it is not as Llama 3's."""
    largest, fits = max(factors, default=1.0), len(factors) == turned // 2
    if fits and all(factor == 1 for factor in factors):
        return {"rope_type": "default"}
    if fits and 1 <= largest < math.inf and isinstance(context, int):
        scaling = {"factor": round(largest, 4), **_LLAMA3, _CONTEXT: context}
        expected = llama3_factors(base, turned, scaling)
        pairs = zip(factors, expected, strict=True)
        if all(math.isclose(found, factor, rel_tol=1e-4) for found, factor in pairs):
            return {"rope_type": "llama3", **scaling}
    raise UserError(f"its {FACTORS} is not a scaling of Llama 3's kind")
