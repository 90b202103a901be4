"""Converts a GGUF file's network to config.json, and rotary positions in both directions.

Llama 3's scaling and LongRoPE are not fields in GGUF but tensors: the factors of each pair's
wavelength.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gptray.config import UserError
from gptray.config.rope_scaling import RopeScaling
from gptray.gguf.layout import Entry
from gptray.gguf.naming import Family
from gptray.gguf.naming_table import ARCHITECTURES, EMBEDDING, FAMILIES

# Keys, after the architecture, that do not affect the network, or that are checked below.
_IGNORED = ("vocab_size", "tensor_data_layout", "attention.value_length")
# Keys for which these values are not neutral, as they are for others.
_NOT_NEUTRAL = (("attention.causal", False), ("attention.scale", 1.0))
_KV_HEADS, _HEAD_WIDTH = "num_key_value_heads", "head_dim"
# For Gemma 3 with this many layers, llama.cpp divides scores by another width.
_SCORES, OTHER_SCORES = "query_pre_attn_scalar", 62
# Rotary positions: the tensors with Llama 3's scaling and LongRoPE's two, and keys after the
# architecture.
LLAMA3, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
FACTORS = (LLAMA3, SHORT, LONG)
_BASE, _ROTARY_WIDTH, _KIND = "rope.freq_base", "rope.dimension_count", "rope.scaling.type"
_FACTOR, _OLD_FACTOR = "rope.scaling.factor", "rope.scale_linear"
_SCALE = "rope.scaling.attn_factor"
_YARN = {
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
_ROTARY = (_BASE, _ROTARY_WIDTH, _KIND, _FACTOR, _OLD_FACTOR, _SCALE, *_YARN.values())
_CONTEXT = "original_max_position_embeddings"
# Those of every Llama since 3.1; another context is in a field.
_LLAMA3_SLOPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192


def family_of_file(fields: Mapping[str, object]) -> Family:
    """The family as which a file is read. Raises UserError for an unknown architecture."""
    architecture = fields.get("general.architecture")
    for family in FAMILIES:
        if family.architecture == architecture:
            return family
    known = ", ".join(ARCHITECTURES)
    raise UserError(f"its architecture {architecture!r:.40} is not supported; {known} are")


def network_json(
    fields: Mapping[str, object],
    entries: Sequence[Entry],
    *,
    tied: bool,
    factors: Mapping[str, Sequence[float]],
) -> dict[str, object]:
    """The network's config.json.

    tied: the embedding is also the head. factors: the file's tensors of FACTORS. Raises UserError
    for a missing field or an unknown network.
    """
    family = family_of_file(fields)
    own = _own_fields(fields, family)
    optional = {name: own.get(key) or None for name, key in family.optional.items()}
    rows = next((one.shape[0] for one in entries if one.name == EMBEDDING and one.shape), None)
    if rows is None:
        raise UserError(f"it has no {EMBEDDING}")
    numbers, head = _numbers(own, family)
    names = {one.name for one in entries}
    numbers |= {key: one in names for key, one in family.biases.items()}
    if family.is_rotary:
        numbers["rope_scaling"] = rotary_parameters(own, head, factors)
    return {
        "model_type": family.model_type,
        "vocab_size": rows,
        **numbers,
        **optional,
        "tie_word_embeddings": tied,
    }


def _numbers(own: Mapping[str, object], family: Family) -> tuple[dict[str, object], int]:
    """The network's numbers by config.json's names, checked, and the width of a head.

    own: the architecture's fields. Raises UserError for a number that is missing or wrong.
    """
    numbers = {name: own.get(key) for name, key in family.numbers.items()}
    heads, width = _heads(numbers, family)
    for name, default in ((_KV_HEADS, heads), (_HEAD_WIDTH, width)):
        if name in numbers and numbers[name] is None:
            numbers[name] = default
    for name, number in numbers.items():
        key = family.numbers[name]
        if number is None:
            raise UserError(f"it has no {key}")
        if not isinstance(number, (int, float)) or (isinstance(number, int) and number < 0):
            raise UserError(f"its {key} is {number!r:.40}, which is not valid")
    if _SCORES in numbers and numbers["num_hidden_layers"] == OTHER_SCORES:
        numbers[_SCORES] = width
    if numbers.get(_KV_HEADS) == 0:
        raise UserError(f"its {family.numbers[_KV_HEADS]} is 0")
    head = numbers.get(_HEAD_WIDTH, width)
    if not isinstance(head, int) or not isinstance(numbers.get(_KV_HEADS, heads), int):
        raise UserError("its numbers of heads are not whole numbers")
    if own.get("attention.value_length", head) != head:
        raise UserError("its heads' values are not as wide as their keys")
    return numbers, head


def _heads(numbers: Mapping[str, object], family: Family) -> tuple[int, int]:
    """The number of heads, and the width of one if together they are as wide as the network.

    Raises UserError if a field is missing.
    """
    rotary = family.is_rotary
    names = ("num_attention_heads", "hidden_size") if rotary else ("n_head", "n_embd")
    heads, width = (numbers[name] for name in names)
    for name, number in zip(names, (heads, width), strict=True):
        if not isinstance(number, int):
            raise UserError(f"it has no {family.numbers[name]}")
    assert isinstance(heads, int) and isinstance(width, int)
    if not 0 < heads <= width:
        raise UserError(f"it has {heads:,} heads for a width of {width:,}")
    return heads, width // heads


def _own_fields(fields: Mapping[str, object], family: Family) -> dict[str, object]:
    """The architecture's fields, without its name. Raises UserError for an unknown field."""
    prefix = f"{family.architecture}."
    own = {
        key.removeprefix(prefix): _shortest(value)
        for key, value in fields.items()
        if key.startswith(prefix)
    }
    known = {*family.numbers.values(), *family.optional.values(), *_IGNORED}
    known |= {*_ROTARY} if family.is_rotary else set()
    for key, value in own.items():
        if key in known and isinstance(value, list):
            raise UserError(
                f"its {prefix}{key} is a list with a number for each layer, which is not supported"
            )
        changes_nothing = value in (0, 1.0, "", "none") and (key, value) not in _NOT_NEUTRAL
        if key not in known and not changes_nothing:
            raise UserError(f"its {prefix}{key} is {value!r:.40}, which is not supported")
    return own


def _shortest(value: object) -> object:
    """An fp32 number in the fewest digits that identify it; other values unchanged."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value


def rotary_parameters(
    fields: Mapping[str, object], head: int, factors: Mapping[str, Sequence[float]]
) -> dict[str, object]:
    """The rope_scaling of config.json.

    fields: GGUF's, by their keys after the architecture. head: the width of a head. factors: as in
    `network_json`. Raises UserError for an unknown scaling.
    """
    base, rotary_width = fields.get(_BASE, 10000.0), fields.get(_ROTARY_WIDTH, head)
    if (
        not isinstance(base, float)
        or not isinstance(rotary_width, int)
        or not (0 < base < math.inf and 0 < rotary_width <= head)
    ):
        raise UserError(
            f"its {_BASE} and {_ROTARY_WIDTH} do not describe a rotation of {head} numbers"
        )
    plain = {"rope_theta": base, "partial_rotary_factor": rotary_width / head}
    kind, factor = fields.get(_KIND), fields.get(_FACTOR, fields.get(_OLD_FACTOR))
    context, scale = fields.get(_YARN[_CONTEXT]), fields.get(_SCALE, 1.0)
    if SHORT in factors and LONG in factors:
        both = {"short_factor": [*factors[SHORT]], "long_factor": [*factors[LONG]]}
        longrope = {**plain, **both, "attention_factor": scale, _CONTEXT: context}
        return {**longrope, "rope_type": "longrope"}
    if scale != 1:
        raise UserError(f"its {_SCALE} is {scale!r:.40}, which is not supported")
    if LLAMA3 in factors:
        context = context or _LLAMA3_CONTEXT
        return {**plain, **_llama3_scaling(factors[LLAMA3], base, rotary_width, context)}
    if kind == "none" or (kind is None and factor in (None, 0.0, 1.0)):
        return {**plain, "rope_type": "default"}
    if kind == "yarn":
        yarn = {name: fields[key] for name, key in _YARN.items() if key in fields}
        return {**plain, "rope_type": "yarn", "factor": factor, **yarn}
    if kind in (None, "linear"):
        return {**plain, "rope_type": "linear", "factor": factor}
    raise UserError(f"its {_KIND} {kind!r:.40} is not supported; none, linear and yarn are")


def rotary_fields(base: float, rotary_width: int, scaling: RopeScaling | None) -> dict[str, object]:
    """GGUF's rotary fields, by their keys after the architecture.

    rotary_width: rotated dimensions of a head. scaling: Hugging Face's rope_scaling. Raises
    UserError for a scaling that llama.cpp does not compute.
    """
    fields: dict[str, object] = {_BASE: base, _ROTARY_WIDTH: rotary_width}
    if not scaling:
        return fields
    kind = scaling["rope_type"]
    numbers = {name: value for name, value in scaling.items() if isinstance(value, (int, float))}
    if kind == "llama3":
        if any(numbers[name] != number for name, number in _LLAMA3_SLOPE.items()):
            raise UserError(
                "GGUF files can hold Llama 3's rope_scaling only with factors of 1 and 4"
            )
        return fields | {_YARN[_CONTEXT]: int(numbers[_CONTEXT])}
    if kind == "longrope":
        shared = {_KIND: kind, _YARN[_CONTEXT]: int(numbers[_CONTEXT])}
        return fields | shared | {_SCALE: float(numbers["attention_factor"])}
    fields |= {_KIND: kind, _FACTOR: float(numbers["factor"])}
    for name in numbers.keys() - {"factor"}:
        if name not in _YARN:
            raise UserError(f"GGUF files cannot hold rope_scaling's {name}")
        value = numbers[name]
        fields[_YARN[name]] = int(value) if name.startswith("original") else float(value)
    return fields


def rotary_factors(
    base: float, rotary_width: int, scaling: RopeScaling | None
) -> dict[str, list[float]]:
    """The tensors of a scaling that fields cannot hold."""
    match scaling or {}:
        case {"rope_type": "llama3"} as llama3:
            return {LLAMA3: _llama3_factors(base, rotary_width, llama3)}
        case {"short_factor": list(short), "long_factor": list(long)}:
            return {SHORT: short, LONG: long}
    return {}


def _llama3_factors(base: float, rotary_width: int, scaling: RopeScaling) -> list[float]:
    """The factors by which Llama 3's scaling lengthens each wavelength, (rotary_width / 2,)."""
    numbers = {name: value for name, value in scaling.items() if isinstance(value, (int, float))}
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    context, factor = numbers[_CONTEXT], numbers["factor"]
    factors = []
    for pair in range(rotary_width // 2):
        turns = context / (2 * math.pi * base ** (2 * pair / rotary_width))
        kept = (turns - low) / (high - low) if high != low else turns - low
        kept = min(max(kept, 0.0), 1.0)
        factors.append(1 / ((1 - kept) / factor + kept))
    return factors


def _llama3_scaling(
    factors: Sequence[float], base: float, rotary_width: int, context: object
) -> dict[str, object]:
    """The rope_scaling with these factors. Raises UserError if it is not like Llama 3's."""
    largest, fits = max(factors, default=1.0), len(factors) == rotary_width // 2
    if fits and all(factor == 1 for factor in factors):
        return {"rope_type": "default"}
    if fits and 1 <= largest < math.inf and isinstance(context, int):
        scaling: RopeScaling = {"factor": round(largest, 4), **_LLAMA3_SLOPE, _CONTEXT: context}
        expected = _llama3_factors(base, rotary_width, scaling)
        pairs = zip(factors, expected, strict=True)
        if all(math.isclose(found, factor, rel_tol=1e-4) for found, factor in pairs):
            return {"rope_type": "llama3", **scaling}
    raise UserError(f"its {LLAMA3} is not a scaling like Llama 3's")
