"""What a row of `gptray.model.families` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gptray.config.model_section import ROPE_SCALINGS


@dataclass(frozen=True)
class Key:
    """A key of config.json: its default where a file leaves it out.

    words: what values of a choice are called there, several times where they have several names.
    also: further keys that are written with the same value.
    """

    name: str
    default: object
    words: Mapping[str, str] | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One model_type.

    architecture: transformers' class; None: transformers does not know it. keys: the fields of
    ModelConfig that it leaves open. always: those that it does not. fixed: what else a file may
    say, since this network does it; the first value is the default. windows: how sliding windows
    are written; window: one where a file says none; pattern: every how many layers one has none,
    for files without layer_types; global_rope: whether that has positions. rope_base, local_base,
    rope_part: of rotary positions, for files without rope_parameters; no rope_part: whole heads are
    rotated. scores: a number whose root scores are divided by, the width of a head. scalings: of
    rotary positions, that its class takes. unrotated: every how many layers one has no positions,
    for files without no_rope_layers. prefix, layers: what names of weights and of layers begin
    with. modules: the modules of `gptray.model.parameters` -> theirs; several lie side by side in
    ours. transposed: linear layers are stored (in, out). by_head: q, k and v are side by side for
    each head, not each for all heads. even_heads: n_head must divide n_embd even with a head_dim.
    """

    architecture: str | None
    keys: Mapping[str, Key]
    always: Mapping[str, object]
    modules: Mapping[str, tuple[str, ...]]
    prefix: str
    layers: str
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    windows: Literal["none", "all", "from a layer", "by layer"] = "none"
    window: int | None = 4096
    pattern: int = 4
    global_rope: bool = True
    rope_base: Key = Key("rope_theta", 10000.0)
    rope_part: Key | None = None
    local_base: Key | None = None
    scores: Key | None = None
    scalings: tuple[str, ...] = tuple(ROPE_SCALINGS)
    unrotated: Key | None = None
    transposed: bool = False
    by_head: bool = False
    even_heads: bool = False
