"""Reads a network from the config.json of any family, and writes it.

Without torch, so a dry run answers at once.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from gptray.config import ModelConfig, UserError
from gptray.config.limits import LARGEST
from gptray.model.families import FAMILIES, KNOWN, OWN, SHAPE
from gptray.model.family import Family
from gptray.model.hf_positions import (
    Raw,
    Unsupported,
    position_fields,
    stretched,
    written_positions,
)
from gptray.model.usage import one_or_all
from gptray.storage.stored import is_whole, read_foreign


def read_config(path: Path) -> tuple[str, ModelConfig]:
    """The model_type of a config.json, and its network; vocab_size is the embedding's rows.

    Raises UserError, naming the file and what in it is not supported.
    """
    raw = read_foreign(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{path}: model_type {model_type!r:.60} is not one of {', '.join(KNOWN)}")
    try:
        return model_type, _fields(raw, FAMILIES[model_type])
    except ValidationError as error:
        first = error.errors()[0]
        part = str(first["loc"][0]) if first["loc"] else ""
        key = FAMILIES[model_type].keys.get(part)
        name = key.name if key else part
        message = f"{name + ': ' if name else ''}{first['msg'].removeprefix('Value error, ')}"
    except Unsupported as error:
        message = str(error)
    raise UserError(f"{path}: {message}")


def family_in(folder: Path) -> Family:
    """The family of a model folder. Raises UserError."""
    return FAMILIES[read_config(folder / "config.json")[0]]


def family_of(config: ModelConfig, preferred: str | None = None) -> str:
    """The model_type to save a network as: that of the first family that can express it.

    preferred: a model_type to try before the others.
    """
    first = {name: family for name, family in KNOWN.items() if name == preferred}
    for model_type, family in (first | FAMILIES).items():
        try:
            written = {**_written(config, family), "vocab_size": 1}
            read = _fields(written, family)
        except (ValidationError, Unsupported):
            continue
        if family.even_heads and config.n_embd % config.n_head:
            continue
        if _canonical(read) == _canonical(config):
            return model_type
    raise AssertionError(f"{OWN} expresses all")


def hf_config(
    config: ModelConfig,
    vocab_size: int,
    model_type: str,
    *,
    bos_token_id: int | None,
    eos_ids: list[int],
) -> dict[str, object]:
    """The config.json of a network as a `model_type` that can express it."""
    family = FAMILIES[model_type]
    return {
        **({"architectures": [family.architecture]} if family.architecture else {}),
        "model_type": model_type,
        **_written(config, family),
        "vocab_size": vocab_size,
        "bos_token_id": bos_token_id,
        "eos_token_id": one_or_all(eos_ids),
        "pad_token_id": None,  # some classes would have one beyond a smaller vocabulary
        "dtype": "float32",
    }


def network_json(config: ModelConfig, model_type: str) -> dict[str, object]:
    """A network's keys in the config.json of a model_type that can express it."""
    return _written(config, FAMILIES[model_type])


def _fields(raw: Raw, family: Family) -> ModelConfig:
    """The network of a config.json. Raises Unsupported and ValidationError."""
    for name, allowed in family.fixed.items():
        if raw.get(name, allowed[0]) not in allowed:  # a list or an object is simply not in it
            raise Unsupported(f"{name}={raw[name]!r:.60} is not supported, only {allowed[0]!r}")
    values: dict[str, object] = dict(family.always)
    for field, key in family.keys.items():
        value = raw.get(key.name, key.default)
        if key.words is not None:
            if not isinstance(value, str) or value not in key.words:
                words = ", ".join(map(repr, key.words))
                raise Unsupported(f"{key.name}={value!r:.60} is not supported, only {words}")
            value = key.words[value]
        if is_whole(value, least=LARGEST + 1):
            raise Unsupported(f"{key.name} is above {LARGEST:,}, which is implausible")
        values[field] = value
    if values["vocab_size"] is None:
        raise Unsupported("vocab_size is null; it must be the number of rows of the embedding")
    values |= position_fields(raw, family, values)
    config = ModelConfig.model_validate(values, strict=True)
    if family.equal:
        key, name, words = family.equal
        given, width = raw.get(key.name, key.default), getattr(config, name)
        if given not in (width, key.default and width):
            only = f"only the {width} of {words}"
            raise Unsupported(f"{key.name}={given!r:.60} is not supported, {only}")
    return config


def _written(config: ModelConfig, family: Family) -> dict[str, object]:
    """A network's keys in config.json, as far as the family can express it."""
    written: dict[str, object] = {}
    # Few classes know null.
    resolved = {
        "n_inner": config.inner,
        "n_kv_head": config.kv_heads,
        "head_dim": config.head_width,
        "attention_scale": config.score_scale,
        "embedding_multiplier": config.embedding_scale,
    }
    is_rotary = family.always.get("positions") == "rotary"
    for field, key in family.keys.items():
        value = getattr(config, field)
        if value is None and (is_rotary or key.default is not None):
            value = resolved.get(field)
        if key.words is not None:
            value = next((word for word, meant in key.words.items() if meant == value), None)
        written |= dict.fromkeys((key.name, *key.also), value)
    written |= {name: allowed[0] for name, allowed in family.fixed.items()}
    if family.equal:
        key, name, _ = family.equal
        written[key.name] = getattr(config, name)
    return written | written_positions(config, family)


# Fields of which several values can mean the same.
_AMBIGUOUS = {
    *("sliding_window", "layer_types", "global_rope", "no_rope_layers"),
    *("partial_rotary_factor", "rope_theta", "local_rope_theta"),
    *("attention_scale", "scale_embedding", "embedding_multiplier"),
}


def _canonical(config: ModelConfig) -> str:
    """A canonical form of the network, equal for configs that compute the same."""
    fields = config.model_dump(include={*SHAPE} - _AMBIGUOUS - {"initializer_range"})
    layers, contexts = range(config.n_layer), stretched(config)
    fields |= {
        "n_positions": contexts[1] if contexts else config.n_positions,
        "n_inner": config.inner,
        "n_kv_head": config.kv_heads,
        "head_dim": config.head_width,
        "scales": (config.score_scale, config.embedding_scale),
        "rotary": (config.rotary_width, config.rope_theta if config.rotary_width else 0),
        "local": _local(config),
        "windows": [config.window(layer) for layer in layers],
        "rotates": [config.rotates(layer) for layer in layers],
    }
    return json.dumps(fields, sort_keys=True)


def _local(config: ModelConfig) -> object:
    """The base and the scaling of rotations in layers with a window, if there are any."""
    if not any(config.window(layer) and config.rotates(layer) for layer in range(config.n_layer)):
        return None
    own = config.local_rope_theta
    return (own, None) if own else (config.rope_theta, config.rope_scaling)
