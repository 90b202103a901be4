"""A row of the table in `gptray.gguf.naming_table`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# The most rows of all heads together; real networks have some ten thousand.
_MAX_ROWS = 1 << 20


@dataclass(frozen=True)
class Family:
    """A model family: maps Hugging Face's names to GGUF's, without .weight and .bias.

    model_type, architecture: its names in Hugging Face and llama.cpp. numbers: keys of config.json
    to GGUF's keys after the architecture. optional: likewise, for keys that a file may omit.
    layers: the prefix of a block's number. names, in_block: modules outside of blocks, and in one.
    biased: modules of in_block that may have a bias in llama.cpp. transposed: linear layers that
    Hugging Face stores (in, out) and GGUF (out, in). rotated: weights whose rows GGUF interleaves
    within a head (0, half, 1, half + 1, ...), and config.json's key for their number of heads.
    by_head: weights whose queries, keys and values Hugging Face stores head by head, and GGUF one
    after the other. whole: tables of names that llama.cpp keeps in fp32. scalings: the scalings of
    rotary positions that llama.cpp computes. pattern: every pattern-th layer has no sliding window;
    None: llama.cpp computes no windows. is_centred: Hugging Face stores weights of norms minus 1.
    is_rotary: it has the rotary fields of `gptray.gguf.network_config`. is_strict: llama.cpp needs
    every bias. needs_head: it needs a head even if that is the embedding; is_tied: it knows no
    other. biases: keys of config.json that say which biases there are, and one of them in GGUF.
    """

    model_type: str
    architecture: str
    numbers: Mapping[str, str]
    layers: str
    names: Mapping[str, str]
    in_block: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    biased: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    rotated: Mapping[str, str] = field(default_factory=dict)
    by_head: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    scalings: tuple[str, ...] = ("linear", "yarn")
    pattern: int | None = None
    is_centred: bool = False
    is_rotary: bool = True
    is_strict: bool = False
    needs_head: bool = False
    is_tied: bool = False
    biases: Mapping[str, str] = field(default_factory=dict)

    def gguf_name(self, name: str) -> tuple[str, str]:
        """A weight's name in GGUF, and its key in the tables."""
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(re.escape(self.layers) + r"(\d+)\.(.+)", stem)
        if block:
            return f"blk.{block[1]}.{self.in_block[block[2]]}.{kind}", block[2]
        return f"{self.names[stem]}.{kind}", stem

    def hf_name(self, name: str) -> tuple[str, str] | None:
        """A weight's name in Hugging Face's files, and its key in the tables; None if unknown."""
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
        table = self.in_block if block else self.names
        part = {theirs: ours for ours, theirs in table.items()}.get(block[2] if block else stem)
        if part is None:
            return None
        return (f"{self.layers}{block[1]}.{part}" if block else part) + f".{kind}", part

    def row_order(self, part: str, rows: int, numbers: Mapping[str, object]) -> list[int] | None:
        """For each row of a weight in GGUF, its row in Hugging Face's file; None: the same order.

        numbers: config.json's. Empty if the rows do not match the number of heads.
        """
        name = self.rotated.get(part, "num_attention_heads" if part in self.by_head else None)
        if name is None:
            return None
        heads = numbers[name]
        assert isinstance(heads, int)
        if not 0 < heads <= rows <= _MAX_ROWS:
            return []
        if part in self.rotated:
            half = rows // heads // 2
            pairs = [half * side + row for row in range(half) for side in (0, 1)]
            return [2 * half * head + row for head in range(heads) for row in pairs]
        width = rows // heads // 3
        starts = [width * (3 * head + kind) for kind in range(3) for head in range(heads)]
        return [start + row for start in starts for row in range(width)]
