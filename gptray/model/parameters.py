"""A network's parameters, and their tensors in the weight files of its family; no torch here.

Linear layers with the same input are fused: queries, keys and values in `c_attn`, gate and input of
a gated MLP in `c_fc`. Weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gptray.config import ModelConfig
from gptray.model.family import Family

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
# GPT-NeoX's head in files from older releases of transformers.
_OLD_HEAD = "embed_out.weight"
# Ends of names of tensors in old files that are not weights: causal masks and rotary frequencies.
IGNORED = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)


Layout = Literal["", "transposed", "by_head", "by_pair"]


@dataclass(frozen=True)
class Part:
    """A tensor of a weight file: rows `start` to `start + rows` of a parameter.

    dims: its shape in the file; more rows than `rows` are unused ones before these. layout: its
    layout in the file, see `Family`.
    """

    name: str
    dims: list[int]
    parameter: str
    start: int
    rows: int
    layout: Layout = ""

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a linear layer in a block."""
        return self.parameter.startswith("transformer.h.") and len(self.dims) == 2


@dataclass(frozen=True)
class Module:
    """A module's parameters: a weight (sum of parts, *inputs) of fused parts; perhaps a bias."""

    name: str
    parts: tuple[int, ...]
    inputs: tuple[int, ...]
    has_bias: bool


def block_modules(config: ModelConfig) -> list[Module]:
    """The modules of one block, in the network's order but for norms of outputs."""
    width, head, inner = config.n_embd, config.head_width, config.inner
    queries, keys = config.n_head * head, config.kv_heads * head
    gated = (inner, inner) if config.is_gated else (inner,)
    outputs = ("ln_1_out", "ln_2_out") if config.sandwich_norm else ()
    both = zip(("q_norm", "k_norm"), config.qk_norm_widths, strict=True)
    heads = [Module(f"attn.{name}", (one,), (), False) for name, one in both]
    return [
        *_norm("ln_1", config),
        Module("attn.c_attn", (queries, keys, keys), (width,), config.qkv_bias),
        *(heads if config.qk_norm else []),
        Module("attn.c_proj", (width,), (queries,), config.attn_out_bias),
        *_norm("ln_2", config),
        Module("mlp.c_fc", gated, (width,), config.mlp_bias),
        Module("mlp.c_proj", (width,), (inner,), config.mlp_bias),
        *(norm for name in outputs for norm in _norm(name, config)),
    ]


def outer_modules(config: ModelConfig, rows: int) -> list[Module]:
    """The modules outside the blocks, without the head; rows: the embedding's."""
    width = config.n_embd
    learned = config.positions == "learned"
    return [
        Module("wte", (rows,), (width,), False),
        *([Module("wpe", (config.n_positions,), (width,), False)] if learned else []),
        *_norm("ln_f", config),
    ]


def _norm(name: str, config: ModelConfig) -> list[Module]:
    if config.norm == "none":
        return []
    return [Module(name, (config.n_embd,), (), config.norm == "layernorm")]


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """The number of parameters with `vocab_size` rows, counting a tied head once."""
    head = 0 if config.tie_word_embeddings else vocab_size * config.n_embd
    outer = sum(map(_numbers, outer_modules(config, vocab_size)))
    return outer + config.n_layer * sum(map(_numbers, block_modules(config))) + head


def _numbers(module: Module) -> int:
    outputs = sum(module.parts)
    inputs = module.inputs[0] if module.inputs else 1
    return outputs * (inputs + (1 if module.has_bias else 0))


def stored_parts(config: ModelConfig, family: Family, rows: int) -> Iterator[Part]:
    """Yield every tensor of a network's weight files, the embedding first, an untied head last."""
    for module in outer_modules(config, rows):
        yield from _parts(module, config, family, "")
    for layer in range(config.n_layer):
        for module in block_modules(config):
            yield from _parts(module, config, family, f"{layer}.")
    if not config.tie_word_embeddings:
        yield Part(HEAD, [rows, config.n_embd], HEAD, 0, rows)


def stored_name(name: str, family: Family) -> str:
    """The canonical name of a file's tensor; files of a network without a head omit the prefix."""
    if name in (HEAD, _OLD_HEAD):
        return HEAD
    return name if name.startswith(family.prefix) else family.prefix + name


def _parts(module: Module, config: ModelConfig, family: Family, layer: str) -> Iterator[Part]:
    names = family.modules[module.name]
    sizes = module.parts if len(names) > 1 else (sum(module.parts),)
    own = f"transformer.{'h.' + layer if layer else ''}{module.name}"
    theirs = f"{family.prefix}{family.layers + layer if layer else ''}"
    is_linear = bool(layer and module.inputs)
    start = 0
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        layout: Layout = ""
        if family.by_head and module.name == "attn.c_attn":
            layout = "by_head"
        elif family.by_pair and module.name == "attn.c_attn" and number < 2:  # q and k
            layout = "by_pair"
        unused = family.first_position if module.name == "wpe" else 0
        weight = [size + unused, *module.inputs]
        yield Part(
            f"{theirs}{name}.weight",
            weight[::-1] if is_linear and family.transposed else weight,
            f"{own}.weight",
            start,
            size,
            "transposed" if is_linear and family.transposed else layout,
        )
        if module.has_bias:
            yield Part(f"{theirs}{name}.bias", [size], f"{own}.bias", start, size, layout)
        start += size
