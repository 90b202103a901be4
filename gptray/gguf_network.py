"""The network of a GGUF file as config.json says it, and its rotary positions both ways.

Llama 3's scaling and LongRoPE are no fields there but tensors: how many times longer each pair's
wavelength is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gptray.config import UserError
from gptray.config.model_section import RopeScaling
from gptray.gguf_families import ARCHITECTURES, EMBEDDING, FAMILIES, Family
from gptray.gguf_header import Entry

# What follows the architecture in keys that shape nothing, or that are looked at below.
_SHAPELESS = ("vocab_size", "tensor_data_layout", "attention.value_length")
# Elsewhere these values change nothing.
_UNLIKE = (("attention.causal", False), ("attention.scale", 1.0))
_KV_HEADS, _HEAD_WIDTH = "num_key_value_heads", "head_dim"
# Of Gemma 3: what llama.cpp takes for another width where there are so many layers.
_SCORES, OTHER_SCORES = "query_pre_attn_scalar", 62
# Of rotary positions: tensors with Llama 3's scaling and LongRoPE's two, and fields, after the
# architecture.
LLAMA3, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
FACTORS = (LLAMA3, SHORT, LONG)
_BASE, _TURNED, _KIND = "rope.freq_base", "rope.dimension_count", "rope.scaling.type"
_FACTOR, _OLD_FACTOR = "rope.scaling.factor", "rope.scale_linear"
_SCALE = "rope.scaling.attn_factor"
_YARN = {
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
_ROTARY = (_BASE, _TURNED, _KIND, _FACTOR, _OLD_FACTOR, _SCALE, *_YARN.values())
_CONTEXT = "original_max_position_embeddings"
# Of every Llama since 3.1; other contexts are in a field.
_LLAMA3_SLOPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192


def family_of_file(fields: Mapping[str, object]) -> Family:
    """The family that a file is read as. Raises UserError for one that is not known."""
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
    """What config.json says of the network.

    tied: there is no head besides the embedding. factors: the tensors of FACTORS that there are.
    Raises UserError for what is missing or no known network.
    """
    family = family_of_file(fields)
    own = _own_fields(fields, family)
    numbers = {name: own.get(key) for name, key in family.numbers.items()}
    optional = {name: own.get(key) or None for name, key in family.optional.items()}
    rows = next((one.shape[0] for one in entries if one.name == EMBEDDING and one.shape), None)
    heads, width = _heads(numbers, family)
    if _KV_HEADS in numbers and numbers[_KV_HEADS] is None:
        numbers[_KV_HEADS] = heads
    if _HEAD_WIDTH in numbers and numbers[_HEAD_WIDTH] is None:
        numbers[_HEAD_WIDTH] = width
    if rows is None:
        raise UserError(f"it has no {EMBEDDING}")
    for name, number in numbers.items():
        key = family.numbers[name]
        if number is None:
            raise UserError(f"it has no {key}")
        if not isinstance(number, (int, float)) or (isinstance(number, int) and number < 0):
            raise UserError(f"its {key} is {number!r:.40}, no number of a network")
    if _SCORES in numbers and numbers["num_hidden_layers"] == OTHER_SCORES:
        numbers[_SCORES] = width
    if numbers.get(_KV_HEADS) == 0:
        raise UserError(f"its {family.numbers[_KV_HEADS]} is 0")
    head = numbers.get(_HEAD_WIDTH, width)
    if not isinstance(head, int) or not isinstance(numbers.get(_KV_HEADS, heads), int):
        raise UserError("its numbers of heads are not whole numbers")
    if own.get("attention.value_length", head) != head:
        raise UserError("its heads' values are not as wide as their keys")
    names = {one.name for one in entries}
    if family.rotated:
        numbers["attention_bias"] = "blk.0.attn_q.bias" in names
        numbers["mlp_bias"] = "blk.0.ffn_up.bias" in names
    if family.is_rotary:
        numbers["rope_scaling"] = rotary_parameters(own, head, factors)
    return {
        "model_type": family.model_type,
        "vocab_size": rows,
        **numbers,
        **optional,
        "tie_word_embeddings": tied,
    }


def _heads(numbers: Mapping[str, object], family: Family) -> tuple[int, int]:
    """How many heads there are, and how wide one is if together they are as wide as the network.

    Raises UserError where that is not known.
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
    """The fields of the architecture, without its name. Raises UserError for what is not known."""
    prefix = f"{family.architecture}."
    own = {
        key.removeprefix(prefix): _shortest(value)
        for key, value in fields.items()
        if key.startswith(prefix)
    }
    known = {*family.numbers.values(), *family.optional.values(), *_SHAPELESS}
    known |= {*_ROTARY} if family.is_rotary else set()
    for key, value in own.items():
        if key in known and isinstance(value, list):
            raise UserError(
                f"its {prefix}{key} is a list with a number for each layer, which is not supported"
            )
        changes_nothing = value in (0, 1.0, "", "none") and (key, value) not in _UNLIKE
        if key not in known and not changes_nothing:
            raise UserError(f"its {prefix}{key} is {value!r:.40}, which is not supported")
    return own


def _shortest(value: object) -> object:
    """A number; one that was stored in 32 bits in as few digits as tell it from others."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value


def rotary_parameters(
    fields: Mapping[str, object], head: int, factors: Mapping[str, Sequence[float]]
) -> dict[str, object]:
    """rope_scaling of config.json.

    fields: GGUF's, by what follows the architecture. head: the width of a head. factors: as
    `network_json`. Raises UserError for a scaling that is not known.
    """
    base, turned = fields.get(_BASE, 10000.0), fields.get(_TURNED, head)
    if (
        not isinstance(base, float)
        or not isinstance(turned, int)
        or not (0 < base < math.inf and 0 < turned <= head)
    ):
        raise UserError(f"its {_BASE} and {_TURNED} do not describe a rotation of {head} numbers")
    plain = {"rope_theta": base, "partial_rotary_factor": turned / head}
    kind, factor = fields.get(_KIND), fields.get(_FACTOR, fields.get(_OLD_FACTOR))
    context, scale = fields.get(_YARN[_CONTEXT]), fields.get(_SCALE, 1.0)
    if SHORT in factors and LONG in factors:
        both = {"short_factor": [*factors[SHORT]], "long_factor": [*factors[LONG]]}
        longrope = {**plain, **both, "attention_factor": scale, _CONTEXT: context}
        return {**longrope, "rope_type": "longrope"}
    if scale != 1:
        raise UserError(f"its {_SCALE} is {scale!r:.40}, which is not supported")
    if LLAMA3 in factors:
        return {**plain, **_llama3_of(factors[LLAMA3], base, turned, context or _LLAMA3_CONTEXT)}
    if kind == "none" or (kind is None and factor in (None, 0.0, 1.0)):
        return {**plain, "rope_type": "default"}
    if kind == "yarn":
        yarn = {name: fields[key] for name, key in _YARN.items() if key in fields}
        return {**plain, "rope_type": "yarn", "factor": factor, **yarn}
    if kind in (None, "linear"):
        return {**plain, "rope_type": "linear", "factor": factor}
    raise UserError(f"its {_KIND} {kind!r:.40} is not supported; none, linear and yarn are")


def rotary_fields(base: float, turned: int, scaling: RopeScaling | None) -> dict[str, object]:
    """GGUF's fields, by what follows the architecture.

    turned: how much of a head is rotated. scaling: Hugging Face's rope_scaling. Raises UserError
    for what llama.cpp does not compute.
    """
    fields: dict[str, object] = {_BASE: base, _TURNED: turned}
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


def rotary_factors(base: float, turned: int, scaling: RopeScaling | None) -> dict[str, list[float]]:
    """The tensors of a scaling, where `rotary_fields` are not enough for it."""
    match scaling or {}:
        case {"rope_type": "llama3"} as llama3:
            return {LLAMA3: _llama3_factors(base, turned, llama3)}
        case {"short_factor": list(short), "long_factor": list(long)}:
            return {SHORT: short, LONG: long}
    return {}


def _llama3_factors(base: float, turned: int, scaling: RopeScaling) -> list[float]:
    """How many times longer Llama 3's scaling makes each wavelength, (turned / 2,)."""
    numbers = {name: value for name, value in scaling.items() if isinstance(value, (int, float))}
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    context, factor = numbers[_CONTEXT], numbers["factor"]
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
        scaling: RopeScaling = {"factor": round(largest, 4), **_LLAMA3_SLOPE, _CONTEXT: context}
        expected = _llama3_factors(base, turned, scaling)
        pairs = zip(factors, expected, strict=True)
        if all(math.isclose(found, factor, rel_tol=1e-4) for found, factor in pairs):
            return {"rope_type": "llama3", **scaling}
    raise UserError(f"its {LLAMA3} is not a scaling like Llama 3's")
