"""Rotary positions and sliding windows of a config.json, in both directions."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gptray.config import ModelConfig
from gptray.config.limits import LARGEST, MAX_LAYERS
from gptray.config.model_section import FULL, SLIDING
from gptray.config.rope_scaling import ROPE_SCALINGS
from gptray.model.family import Family, Key
from gptray.storage.stored import is_whole

# transformers' default.
_WINDOWS_FROM = 28
# GPT-Neo's names for the kinds of attention.
_TYPES = {"global": FULL, "local": SLIDING}
_ORIGINAL = "original_max_position_embeddings"

Raw = Mapping[str, object]


class Unsupported(ValueError):
    """A setting of a file that gptray's network does not support."""


def position_fields(raw: Raw, family: Family, values: Mapping[str, object]) -> dict[str, object]:
    """The fields of ModelConfig for positions. values: its other fields. Raises Unsupported."""
    fields = _windows(raw, family, values["n_layer"])
    if family.always.get("positions") == "rotary":
        fields |= _rope(raw, family, values)
    if family.unrotated:
        fields["no_rope_layers"] = _rotating(raw, family.unrotated, values["n_layer"])
    return fields


def written_positions(config: ModelConfig, family: Family) -> dict[str, object]:
    """The keys of config.json."""
    written = _written_windows(config, family)
    if family.always.get("positions") != "rotary":
        return written
    scaling = config.rope_scaling
    written |= {family.rope_base.name: config.rope_theta, "rope_scaling": scaling}
    if contexts := stretched(config):
        # Others derive the factor of cosines and sines from these two, not from rope_scaling.
        written[family.keys["n_positions"].name], written[_ORIGINAL] = contexts
    if family.local_base and family.local_base.name:
        written[family.local_base.name] = config.local_rope_theta or config.rope_theta
    part = family.rope_part.name if family.rope_part else "partial_rotary_factor"
    if family.rope_part or config.partial_rotary_factor != 1:
        written[part] = config.partial_rotary_factor
    return written


def _rope(raw: Raw, family: Family, values: Mapping[str, object]) -> dict[str, object]:
    """The fields of rotary positions, read as in transformers: of rope_scaling and rope_parameters,
    the older key, rope_scaling, takes precedence."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    local = dict[str, object]()
    if family.local_base:
        given, local = _by_kind(raw, family.local_base)
    if not isinstance(given, dict):
        raise Unsupported(f"rope_scaling={given!r:.60} is not a JSON object")
    scaling = {key: value for key, value in given.items() if value is not None}
    part = family.rope_part
    theta = scaling.pop("rope_theta", raw.get(family.rope_base.name, family.rope_base.default))
    key, default = (part.name, part.default) if part else ("partial_rotary_factor", 1.0)
    share = scaling.pop("partial_rotary_factor", raw.get(key, default))
    if part is None and share not in (1, None):
        raise Unsupported(f"partial_rotary_factor={share!r:.60} is not supported, only 1")
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    fields = {"rope_theta": theta, "partial_rotary_factor": 1.0 if share is None else share}
    fields |= local
    if any(isinstance(value, dict) for value in scaling.values()):
        raise Unsupported("rope_parameters for each kind of layer are not supported")
    if kind in ("default", "dynamic"):  # dynamic NTK scaling starts beyond the context
        return fields
    if "short_factor" in scaling and kind in ("su", "yarn"):
        kind = "longrope"  # as older files call it
    if not isinstance(kind, str) or kind not in family.scalings:
        kinds = ", ".join(family.scalings)
        raise Unsupported(f"rope_scaling of rope_type {kind!r:.60} is not supported, only {kinds}")
    if kind != "linear":
        own = scaling.get(_ORIGINAL, values["n_positions"])
        scaling[_ORIGINAL] = raw.get(_ORIGINAL) or own
    if kind == "longrope":
        # Texts beyond this context would be rotated by long_factor from their first token on.
        most, context = values["n_positions"], scaling[_ORIGINAL]
        if is_whole(most, least=1) and is_whole(context, least=2):
            factor = scaling.setdefault("factor", most / context)
            if isinstance(factor, (int, float)):
                scaling.setdefault("attention_factor", _longrope_scale(factor, context))
            fields["n_positions"] = min(most, context)
    needed, optional = ROPE_SCALINGS[kind]
    # Drop keys that only describe the model's origin, such as YaRN's `finetuned`.
    scaling = {key: value for key, value in scaling.items() if key in {*needed, *optional}}
    for key, value in scaling.items():
        if is_whole(value, least=LARGEST + 1):
            raise Unsupported(f"rope_scaling's {key} is above {LARGEST:,}")
    return fields | {"rope_scaling": {"rope_type": kind, **scaling}}


def _by_kind(raw: Raw, key: Key) -> tuple[object, dict[str, object]]:
    """The scaling of layers without a window, and the field with the base of the others."""
    kinds = raw.get("rope_parameters") or {}
    kinds = kinds if isinstance(kinds, dict) else {}
    whole, local = kinds.get(FULL) or {}, kinds.get(SLIDING) or {}
    scaling = raw.get("rope_scaling") or {}
    if not (isinstance(whole, dict) and isinstance(local, dict) and isinstance(scaling, dict)):
        raise Unsupported(f"rope_parameters={kinds!r:.60} are not JSON objects")
    if (kind := local.get("rope_type", "default")) != "default":
        raise Unsupported(f"rope_type {kind!r:.60} of {SLIDING} is not supported, only 'default'")
    theta = local.get("rope_theta") or raw.get(key.name) or key.default
    return {**whole, **scaling}, {"local_rope_theta": theta}


def _longrope_scale(factor: float, context: int) -> float:
    """LongRoPE's factor of cosines and sines (Ding et al. 2024)."""
    return math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0


def _windows(raw: Raw, family: Family, n_layer: object) -> dict[str, object]:
    """The fields of sliding windows."""
    if family.windows == "none":
        return {}
    if family.windows == "by type":
        window = raw.get("window_size", family.window)
        return {"sliding_window": window, "layer_types": _types(raw)}
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
            every = raw.get("sliding_window_pattern") or family.pattern
            if not is_whole(every, least=1):
                raise Unsupported(f"sliding_window_pattern={every!r:.60} needs layer_types")
            types = [SLIDING if (layer + 1) % every else FULL for layer in layers]
        else:
            first = raw.get("max_window_layers", _WINDOWS_FROM)
            if not is_whole(first):
                raise Unsupported(f"max_window_layers={first!r:.60} is not a number of layers")
            types = [SLIDING if layer >= first else FULL for layer in layers]
    global_rope = family.global_rope
    return {"sliding_window": window, "layer_types": types, "global_rope": global_rope}


def _types(raw: Raw) -> list[str]:
    """Each layer's kind of attention, from GPT-Neo's pairs of kinds and how often they repeat."""
    types, given = list[str](), raw.get("attention_types")
    pairs = [[[*_TYPES], 12]] if given is None else given
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        match pair:
            case [[*kinds], int(count)] if len(kinds) * count <= MAX_LAYERS:
                types += [_TYPES.get(str(kind), "") for kind in kinds] * count
            case _:
                types.append("")
    if "" in types:
        raise Unsupported(f"attention_types={given!r:.60} is not supported, only global and local")
    return types


def _rotating(raw: Raw, key: Key, n_layer: object) -> object:
    """Whether each layer has rotary positions."""
    given, layers = raw.get("no_rope_layers"), _layers(n_layer)
    if given is None:
        every = raw.get(key.name, key.default)
        if not is_whole(every, least=1):
            raise Unsupported(f"{key.name}={every!r:.60} is not a number of layers")
        return [int((layer + 1) % every != 0) for layer in layers]
    return given[: len(layers)] if isinstance(given, list) else given


def _layers(n_layer: object) -> range:
    """All layers, if their number is plausible."""
    return range(n_layer if is_whole(n_layer) and n_layer <= MAX_LAYERS else 0)


def stretched(config: ModelConfig) -> tuple[int, int] | None:
    """With LongRoPE: the longest context, and the part of it that gptray computes."""
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
    window = config.sliding_window
    if window is None and family.local_base:
        window = family.window  # these classes require one even if no layer has it
    if family.windows == "by type":
        names = {kind: name for name, kind in _TYPES.items()}
        pairs = [[[names[kind] for kind in types], 1]]
        return {"window_size": window or family.window, "attention_types": pairs}
    shared: dict[str, object] = {"sliding_window": window, "layer_types": types}
    if family.windows == "by layer":
        return shared | {"sliding_window_pattern": None}
    first = types.index(SLIDING) if SLIDING in types else config.n_layer
    return shared | {"use_sliding_window": SLIDING in types, "max_window_layers": first}
