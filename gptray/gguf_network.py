"""The network of a GGUF file as config.json says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gptray.config import UserError
from gptray.gguf_families import ARCHITECTURES, EMBEDDING, FAMILIES, Family
from gptray.gguf_header import Entry
from gptray.gguf_rotary import ROTARY_KEYS, rotary_parameters

# What follows the architecture in keys that shape nothing, or that are looked at below.
_SHAPELESS = ("vocab_size", "tensor_data_layout", "attention.value_length")
# Elsewhere these values change nothing.
_UNLIKE = (("attention.causal", False), ("attention.scale", 1.0))
_KV_HEADS, _HEAD_WIDTH = "num_key_value_heads", "head_dim"


def family_of_file(fields: Mapping[str, object]) -> Family:
    """The family that a file is read as. Raises UserError for one that is not known."""
    architecture = fields.get("general.architecture")
    for family in FAMILIES:
        if family.architecture == architecture:
            return family
    known = ", ".join(ARCHITECTURES)
    raise UserError(f"its architecture {architecture!r:.40} cannot be read; {known} can")


def network_json(
    fields: Mapping[str, object],
    entries: Sequence[Entry],
    *,
    tied: bool,
    factors: Sequence[float] | None,
) -> dict[str, object]:
    """What config.json says of the network.

    tied: there is no head besides the embedding. factors: of the rotary positions, as
    `gptray.gguf_rotary` has them. Raises UserError for what is missing or no known network.
    """
    family = family_of_file(fields)
    own = _own_fields(fields, family)
    numbers = {name: own.get(key) for name, key in family.numbers.items()}
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
    if numbers.get(_KV_HEADS) == 0:
        raise UserError(f"its {family.numbers[_KV_HEADS]} is 0")
    head = numbers.get(_HEAD_WIDTH, width)
    if not isinstance(head, int) or not isinstance(numbers.get(_KV_HEADS, heads), int):
        raise UserError("its heads are no whole numbers")
    if own.get("attention.value_length", head) != head:
        raise UserError("the values of its heads are not as wide as the keys")
    names = {one.name for one in entries}
    if family.rotated:
        numbers["attention_bias"] = "blk.0.attn_q.bias" in names
        numbers["mlp_bias"] = "blk.0.ffn_up.bias" in names
    if family.is_rotary:
        numbers["rope_parameters"] = rotary_parameters(own, head, factors)
    return {
        "model_type": family.model_type,
        "vocab_size": rows,
        **numbers,
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
    known = {*family.numbers.values(), *_SHAPELESS, *(ROTARY_KEYS if family.is_rotary else ())}
    for key, value in own.items():
        if key in known and isinstance(value, list):
            raise UserError(f"its {prefix}{key} is a list, a number for each layer")
        changes_nothing = value in (0, 1.0, "", "none") and (key, value) not in _UNLIKE
        if key not in known and not changes_nothing:
            raise UserError(f"its {prefix}{key} is {value!r:.40}, which is not supported")
    return own


def _shortest(value: object) -> object:
    """A number; one that was stored in 32 bits in as few digits as tell it from others."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value
