"""Reads a network from the config.json of any family, and writes it.

Without torch, so a dry run answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from gptray.config import ModelConfig, UserError
from gptray.config.model_section import FULL, ROPE_SCALINGS, SLIDING
from gptray.model.families import FAMILIES, KNOWN, OWN, SHAPE, Family
from gptray.model.usage import one_or_all
from gptray.stored import is_whole, read_foreign

# The largest plausible dimension.
_MAX_DIMENSION = 2**31 - 1
# transformers' defaults.
_THETA, _WINDOW, _WINDOWS_FROM, _PATTERN = 10000.0, 4096, 28, 4
_ORIGINAL = "original_max_position_embeddings"

Raw = Mapping[str, object]


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
    except _Unsupported as error:
        message = str(error)
    raise UserError(f"{path}: {message}")


def family_in(folder: Path) -> Family:
    """The family of a model folder. Raises UserError."""
    return FAMILIES[read_config(folder / "config.json")[0]]


def family_of(config: ModelConfig) -> str:
    """The model_type to save a network as: that of the first family that can express it."""
    for model_type, family in FAMILIES.items():
        try:
            written = {**_written(config, family), "vocab_size": 1}
            read = _fields(written, family)
        except (ValidationError, _Unsupported):
            continue
        if family.even_heads and config.n_embd % config.n_head:
            continue
        if _canonical(read) == _canonical(config):
            return model_type
    raise AssertionError(f"{OWN} expresses all")


def hf_config(
    config: ModelConfig, vocab_size: int, *, bos_token_id: int | None, eos_ids: list[int]
) -> dict[str, object]:
    """The config.json of a network, for its family's class in transformers."""
    model_type = family_of(config)
    family = FAMILIES[model_type]
    return {
        **({"architectures": [family.architecture]} if family.architecture else {}),
        "model_type": model_type,
        **_written(config, family),
        "vocab_size": vocab_size,
        "bos_token_id": bos_token_id,
        "eos_token_id": one_or_all(eos_ids),
        "dtype": "float32",
    }


def network_json(config: ModelConfig, model_type: str) -> dict[str, object]:
    """A network's keys in the config.json of a model_type that can express it."""
    return _written(config, FAMILIES[model_type])


class _Unsupported(ValueError):
    """A setting of a file that gptray's network does not support."""


def _fields(raw: Raw, family: Family) -> ModelConfig:
    """The network of a config.json. Raises _Unsupported and ValidationError."""
    for name, allowed in family.fixed.items():
        if raw.get(name, allowed[0]) not in allowed:  # a list or an object is simply not in it
            raise _Unsupported(f"{name}={raw[name]!r:.60} is not supported, only {allowed[0]!r}")
    values: dict[str, object] = dict(family.always)
    for field, key in family.keys.items():
        value = raw.get(key.name, key.default)
        if key.words is not None:
            if not isinstance(value, str) or value not in key.words:
                words = ", ".join(map(repr, key.words))
                raise _Unsupported(f"{key.name}={value!r:.60} is not supported, only {words}")
            value = key.words[value]
        if is_whole(value, least=_MAX_DIMENSION + 1):
            raise _Unsupported(f"{key.name} is above {_MAX_DIMENSION:,}, which is implausible")
        values[field] = value
    if values["vocab_size"] is None:
        raise _Unsupported("vocab_size is null; it must be the number of rows of the embedding")
    if family.always.get("positions") == "rotary":
        values |= _rope(raw, family, values)
    values |= _windows(raw, family, values["n_layer"])
    return ModelConfig.model_validate(values, strict=True)


def _rope(raw: Raw, family: Family, values: Mapping[str, object]) -> dict[str, object]:
    """The fields of rotary positions, read as in transformers: of rope_scaling and rope_parameters,
    the older key, rope_scaling, takes precedence."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise _Unsupported(f"rope_scaling={given!r:.60} is not a JSON object")
    scaling = {key: value for key, value in given.items() if value is not None}
    part = family.rope_part
    theta = scaling.pop("rope_theta", raw.get(family.rope_base, _THETA))
    key, default = (part.name, part.default) if part else ("partial_rotary_factor", 1.0)
    share = scaling.pop("partial_rotary_factor", raw.get(key, default))
    if part is None and share not in (1, None):
        raise _Unsupported(f"partial_rotary_factor={share!r:.60} is not supported, only 1")
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    fields = {"rope_theta": theta, "partial_rotary_factor": 1.0 if share is None else share}
    if any(isinstance(value, dict) for value in scaling.values()):
        raise _Unsupported("rope_parameters for each kind of layer are not supported")
    if kind in ("default", "dynamic"):  # dynamic NTK scaling starts beyond the context
        return fields
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        kinds = ", ".join(ROPE_SCALINGS)
        raise _Unsupported(f"rope_scaling of rope_type {kind!r:.60} is not supported, only {kinds}")
    if kind != "linear":
        own = scaling.get(_ORIGINAL, values["n_positions"])
        scaling[_ORIGINAL] = raw.get(_ORIGINAL) or own
    needed, optional = ROPE_SCALINGS[kind]
    # Drop keys that only describe the model's origin, such as YaRN's `finetuned`.
    scaling = {key: value for key, value in scaling.items() if key in {*needed, *optional}}
    for key, value in scaling.items():
        if is_whole(value, least=_MAX_DIMENSION + 1):
            raise _Unsupported(f"rope_scaling's {key} is above {_MAX_DIMENSION:,}")
    return fields | {"rope_scaling": {"rope_type": kind, **scaling}}


def _windows(raw: Raw, family: Family, n_layer: object) -> dict[str, object]:
    """The fields of sliding windows."""
    if family.windows == "none":
        return {}
    window = raw.get("sliding_window", _WINDOW)
    if family.windows == "all":
        return {"sliding_window": window}
    is_by_layer = family.windows == "by layer"
    if window is None or not (is_by_layer or raw.get("use_sliding_window", False)):
        return {}
    types = raw.get("layer_types")
    if types is None:
        layers = range(n_layer if is_whole(n_layer) and n_layer <= _MAX_LAYERS else 0)
        if is_by_layer:
            every = raw.get("sliding_window_pattern", _PATTERN)
            if not is_whole(every, least=1):
                raise _Unsupported(f"sliding_window_pattern={every!r:.60} needs layer_types")
            types = [SLIDING if (layer + 1) % every else FULL for layer in layers]
        else:
            first = raw.get("max_window_layers", _WINDOWS_FROM)
            if not is_whole(first):
                raise _Unsupported(f"max_window_layers={first!r:.60} is not a number of layers")
            types = [SLIDING if layer >= first else FULL for layer in layers]
    return {"sliding_window": window, "layer_types": types, "global_rope": not is_by_layer}


# The most layers for which layer_types is listed.
_MAX_LAYERS = 100_000


def _written(config: ModelConfig, family: Family) -> dict[str, object]:
    """A network's keys in config.json, as far as the family can express it."""
    written: dict[str, object] = {}
    # Only GPT-2's class knows null.
    resolved = {
        "n_inner": config.inner,
        "n_kv_head": config.kv_heads,
        "head_dim": config.head_width,
    }
    is_rotary = family.always.get("positions") == "rotary"
    for field, key in family.keys.items():
        value = getattr(config, field)
        if value is None and is_rotary:
            value = resolved.get(field)
        if key.words is not None:
            value = next((word for word, meant in key.words.items() if meant == value), None)
        written |= dict.fromkeys((key.name, *key.also), value)
    written |= {name: allowed[0] for name, allowed in family.fixed.items()}
    if is_rotary:
        written |= {family.rope_base: config.rope_theta, "rope_scaling": config.rope_scaling}
        part = family.rope_part.name if family.rope_part else "partial_rotary_factor"
        if family.rope_part or config.partial_rotary_factor != 1:
            written[part] = config.partial_rotary_factor
    return written | _written_windows(config, family)


def _written_windows(config: ModelConfig, family: Family) -> dict[str, object]:
    if family.windows == "none":
        return {}
    if family.windows == "all":
        return {"sliding_window": config.sliding_window}
    layers = range(config.n_layer)
    types = [SLIDING if config.window(layer) is not None else FULL for layer in layers]
    shared: dict[str, object] = {"sliding_window": config.sliding_window, "layer_types": types}
    if family.windows == "by layer":
        return shared | {"sliding_window_pattern": None}
    first = types.index(SLIDING) if SLIDING in types else config.n_layer
    return shared | {"use_sliding_window": SLIDING in types, "max_window_layers": first}


# Fields of which several values can mean the same.
_AMBIGUOUS = {
    "sliding_window",
    "layer_types",
    "global_rope",
    "partial_rotary_factor",
    "rope_theta",
}


def _canonical(config: ModelConfig) -> str:
    """A canonical form of the network, equal for configs that compute the same."""
    fields = config.model_dump(include={*SHAPE} - _AMBIGUOUS - {"initializer_range"})
    layers = range(config.n_layer)
    fields |= {
        "n_inner": config.inner,
        "n_kv_head": config.kv_heads,
        "head_dim": config.head_width,
        "rotary": (config.rotary_width, config.rope_theta if config.rotary_width else 0),
        "windows": [config.window(layer) for layer in layers],
        "rotates": [config.rotates(layer) for layer in layers],
    }
    return json.dumps(fields, sort_keys=True)
