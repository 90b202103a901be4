"""Reads a network from the config.json of any family, and writes it.

Without torch, so a dry run answers at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from gptray.config import ModelConfig, UserError
from gptray.config.model_section import FULL, ROPE_SCALINGS, SLIDING
from gptray.model.families import FAMILIES, KNOWN, OWN, SHAPE
from gptray.model.family import Family, Key
from gptray.model.usage import one_or_all
from gptray.stored import is_whole, read_foreign

# Of a dimension; what is beyond is no network.
_MOST = 2**31 - 1
# transformers' defaults.
_WINDOWS_FROM, _PATTERN = 28, 4
_ORIGINAL = "original_max_position_embeddings"

Raw = Mapping[str, object]


def read_config(path: Path) -> tuple[str, ModelConfig]:
    """The model_type of a config.json, and its network; `rows`: of the embedding.

    Raises UserError naming the file and what in it is not supported.
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
    except _Unlike as error:
        message = str(error)
    raise UserError(f"{path}: {message}")


def family_in(folder: Path) -> Family:
    """The family whose names a model folder's weights have. Raises UserError."""
    return FAMILIES[read_config(folder / "config.json")[0]]


def family_of(config: ModelConfig) -> str:
    """The model_type that a network is saved as: that of the first family that expresses it."""
    for model_type, family in FAMILIES.items():
        try:
            written = {**_written(config, family), "vocab_size": 1}
            read = _fields(written, family)
        except (ValidationError, _Unlike):
            continue
        if family.even_heads and config.n_embd % config.n_head:
            continue
        if _meaning(read) == _meaning(config):
            return model_type
    raise AssertionError(f"{OWN} expresses all")


def hf_config(
    config: ModelConfig, vocab_size: int, *, bos_token_id: int | None, eos_ids: list[int]
) -> dict[str, object]:
    """config.json of a network, as its family's class in transformers reads it."""
    model_type = family_of(config)
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
    """The config.json of a network for a model_type that can express it."""
    return _written(config, FAMILIES[model_type])


class _Unlike(ValueError):
    """What a file says and no network here does."""


def _fields(raw: Raw, family: Family) -> ModelConfig:
    """Raises _Unlike and ValidationError."""
    for name, allowed in family.fixed.items():
        if raw.get(name, allowed[0]) not in allowed:  # a list or an object is simply not in it
            raise _Unlike(f"{name}={raw[name]!r:.60} is not supported, only {allowed[0]!r}")
    values: dict[str, object] = dict(family.always)
    for field, key in family.keys.items():
        value = raw.get(key.name, key.default)
        if key.words is not None:
            if not isinstance(value, str) or value not in key.words:
                words = ", ".join(map(repr, key.words))
                raise _Unlike(f"{key.name}={value!r:.60} is not supported, only {words}")
            value = key.words[value]
        if is_whole(value, least=_MOST + 1):
            raise _Unlike(f"{key.name} is above {_MOST:,}, which is implausible")
        values[field] = value
    if values["vocab_size"] is None:
        raise _Unlike("vocab_size is null; it must be the number of rows of the embedding")
    if family.always.get("positions") == "rotary":
        values |= _rope(raw, family, values)
    values |= _windows(raw, family, values["n_layer"])
    if family.unrotated:
        values["no_rope_layers"] = _rotating(raw, family.unrotated, values["n_layer"])
    return ModelConfig.model_validate(values, strict=True)


def _rope(raw: Raw, family: Family, values: Mapping[str, object]) -> dict[str, object]:
    """The fields of rotary positions, as transformers reads them: where a file has rope_scaling and
    rope_parameters, the older key counts."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise _Unlike(f"rope_scaling={given!r:.60} is not a JSON object")
    scaling = {key: value for key, value in given.items() if value is not None}
    part = family.rope_part
    theta = scaling.pop("rope_theta", raw.get(family.rope_base.name, family.rope_base.default))
    key, default = (part.name, part.default) if part else ("partial_rotary_factor", 1.0)
    share = scaling.pop("partial_rotary_factor", raw.get(key, default))
    if part is None and share not in (1, None):
        raise _Unlike(f"partial_rotary_factor={share!r:.60} is not supported, only 1")
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    fields = {"rope_theta": theta, "partial_rotary_factor": 1.0 if share is None else share}
    if any(isinstance(value, dict) for value in scaling.values()):
        raise _Unlike("rope_parameters for each kind of layer are not supported")
    if kind in ("default", "dynamic"):  # dynamic NTK scaling begins where the context ends
        return fields
    if "short_factor" in scaling and kind in ("su", "yarn"):
        kind = "longrope"  # as older files call it
    if not isinstance(kind, str) or kind not in family.scalings:
        kinds = ", ".join(family.scalings)
        raise _Unlike(f"rope_scaling of rope_type {kind!r:.60} is not supported, only {kinds}")
    if kind != "linear":
        own = scaling.get(_ORIGINAL, values["n_positions"])
        scaling[_ORIGINAL] = raw.get(_ORIGINAL) or own
    if kind == "longrope":
        # Longer texts turn by long_factor, and also the tokens that they begin with.
        most, context = values["n_positions"], scaling[_ORIGINAL]
        if is_whole(most, least=1) and is_whole(context, least=2):
            factor = scaling.setdefault("factor", most / context)
            if isinstance(factor, (int, float)):
                scaling.setdefault("attention_factor", _longrope_scale(factor, context))
            fields["n_positions"] = min(most, context)
    needed, optional = ROPE_SCALINGS[kind]
    # Other keys say where a model comes from, such as YaRN's `finetuned`.
    scaling = {key: value for key, value in scaling.items() if key in {*needed, *optional}}
    for key, value in scaling.items():
        if is_whole(value, least=_MOST + 1):
            raise _Unlike(f"rope_scaling's {key} is above {_MOST:,}")
    return fields | {"rope_scaling": {"rope_type": kind, **scaling}}


def _longrope_scale(factor: float, context: int) -> float:
    """What LongRoPE multiplies cosines and sines by (Ding et al. 2024)."""
    return math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0


def _windows(raw: Raw, family: Family, n_layer: object) -> dict[str, object]:
    """The fields of sliding windows."""
    if family.windows == "none":
        return {}
    window = raw.get("sliding_window", family.window)
    if family.windows == "all":
        return {"sliding_window": window}
    is_by_layer = family.windows == "by layer"
    if window is None or not (is_by_layer or raw.get("use_sliding_window", False)):
        return {}
    types = raw.get("layer_types")
    if types is None:
        layers = _layers(n_layer)
        if is_by_layer:
            every = raw.get("sliding_window_pattern", _PATTERN)
            if not is_whole(every, least=1):
                raise _Unlike(f"sliding_window_pattern={every!r:.60} needs layer_types")
            types = [SLIDING if (layer + 1) % every else FULL for layer in layers]
        else:
            first = raw.get("max_window_layers", _WINDOWS_FROM)
            if not is_whole(first):
                raise _Unlike(f"max_window_layers={first!r:.60} is not a number of layers")
            types = [SLIDING if layer >= first else FULL for layer in layers]
    return {"sliding_window": window, "layer_types": types, "global_rope": not is_by_layer}


def _rotating(raw: Raw, key: Key, n_layer: object) -> object:
    """Of each layer whether it has rotary positions."""
    given, layers = raw.get("no_rope_layers"), _layers(n_layer)
    if given is None:
        every = raw.get(key.name, key.default)
        if not is_whole(every, least=1):
            raise _Unlike(f"{key.name}={every!r:.60} is not a number of layers")
        return [int((layer + 1) % every != 0) for layer in layers]
    return given[: len(layers)] if isinstance(given, list) else given


def _layers(n_layer: object) -> range:
    """The layers of a plausible number of them, which are listed one by one."""
    return range(n_layer if is_whole(n_layer) and n_layer <= 100_000 else 0)


def _written(config: ModelConfig, family: Family) -> dict[str, object]:
    """The keys of config.json that say what a network is, as far as the family can."""
    written: dict[str, object] = {}
    # Null is known only to GPT-2's class.
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
        scaling = config.rope_scaling
        written |= {family.rope_base.name: config.rope_theta, "rope_scaling": scaling}
        if stretched := _stretched(config):
            # Others derive the scale of cosines and sines from these two, not from rope_scaling.
            written[family.keys["n_positions"].name], written[_ORIGINAL] = stretched
        part = family.rope_part.name if family.rope_part else "partial_rotary_factor"
        if family.rope_part or config.partial_rotary_factor != 1:
            written[part] = config.partial_rotary_factor
    return written | _written_windows(config, family)


def _stretched(config: ModelConfig) -> tuple[int, int] | None:
    """With LongRoPE: the longest context, and the part of it that is computed here."""
    scaling = config.rope_scaling or {}
    factor, context = scaling.get("factor"), scaling.get(_ORIGINAL)
    if scaling.get("rope_type") != "longrope":
        return None
    assert isinstance(factor, (int, float)) and isinstance(context, (int, float))
    return max(round(factor * context), config.n_positions), int(context)


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


# Fields that several values of may mean the same.
_AS_MEANT = {
    *("sliding_window", "layer_types", "global_rope", "no_rope_layers"),
    *("partial_rotary_factor", "rope_theta"),
}


def _meaning(config: ModelConfig) -> str:
    """What a network computes, however its config puts it."""
    fields = config.model_dump(include={*SHAPE} - _AS_MEANT - {"initializer_range"})
    layers, stretched = range(config.n_layer), _stretched(config)
    fields |= {
        "n_positions": stretched[1] if stretched else config.n_positions,
        "n_inner": config.inner,
        "n_kv_head": config.kv_heads,
        "head_dim": config.head_width,
        "rotary": (config.rotary_width, config.rope_theta if config.rotary_width else 0),
        "windows": [config.window(layer) for layer in layers],
        "rotates": [config.rotates(layer) for layer in layers],
    }
    return json.dumps(fields, sort_keys=True)
