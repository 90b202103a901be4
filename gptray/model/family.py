"""A row of the table in `gptray.model.families`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gptray.config.rope_scaling import ROPE_SCALINGS


@dataclass(frozen=True)
class Key:
    """A key of config.json, and its default if a file omits it.

    words: the file's names for the values of a choice; a value may have several.
    also: other keys to write with the same value.
    """

    name: str
    default: object
    words: Mapping[str, str] | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One model_type.

    architecture: transformers' class; None: transformers has none. keys: the fields of ModelConfig
    that its config.json sets. always: the fields that are the same in all its models. fixed: other
    keys of config.json, with the values that gptray supports, the default first. windows: how it
    writes sliding windows; window: the default; pattern: every how many layers one has no window,
    in files without layer_types; global_rope: whether it has positions. rope_base, local_base,
    rope_part: its keys for rotary positions in files without rope_parameters; no rope_part: whole
    heads are rotated. equal: a key that must equal a property of ModelConfig, and what its messages
    call that; without a default, null is equal too. first_position: rows of the table of learned
    positions before that of the first. scalings: the scalings of rotary positions that its class
    supports. unrotated: every how many layers one has no positions, in files without
    no_rope_layers. prefix, layers: how the names of weights and of layers begin. modules: its
    modules for each of `gptray.model.parameters`'s, which may fuse several. transposed: linear
    layers are stored (in, out). by_head: q, k and v are interleaved head by head. by_pair: the two
    rows of q or k that are rotated together are neighbours, not half a head apart. even_heads:
    n_head must divide n_embd even if head_dim is set.
    """

    architecture: str | None
    keys: Mapping[str, Key]
    always: Mapping[str, object]
    modules: Mapping[str, tuple[str, ...]]
    prefix: str
    layers: str
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    windows: Literal["none", "all", "from a layer", "by layer", "by type"] = "none"
    window: int | None = 4096
    pattern: int = 4
    global_rope: bool = True
    rope_base: Key = Key("rope_theta", 10000.0)
    rope_part: Key | None = None
    local_base: Key | None = None
    equal: tuple[Key, str, str] | None = None
    first_position: int = 0
    scalings: tuple[str, ...] = tuple(ROPE_SCALINGS)
    unrotated: Key | None = None
    transposed: bool = False
    by_head: bool = False
    by_pair: bool = False
    even_heads: bool = False
