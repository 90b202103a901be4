"""What GGUF calls the weights and numbers of networks: a table for each family, read both ways.

The names are those of llama.cpp. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A family of networks: Hugging Face's names to GGUF's; weights without .weight and .bias.

    model_type, architecture: Hugging Face's and llama.cpp's name of it. numbers: of config.json, to
    what follows the architecture in GGUF's keys. layers: what stands before a block's number.
    names: what is outside of blocks; in_block: what is in one. transposed: of in_block, linear
    layers that Hugging Face stores (in, out), and GGUF (out, in). whole: of names, tables that
    llama.cpp keeps in fp32.
    """

    model_type: str
    architecture: str
    numbers: Mapping[str, str]
    layers: str
    names: Mapping[str, str]
    in_block: Mapping[str, str]
    transposed: tuple[str, ...]
    whole: tuple[str, ...]

    def gguf_name(self, name: str) -> tuple[str, str]:
        """A weight's name in GGUF, and the part of its own that the tables have."""
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(re.escape(self.layers) + r"(\d+)\.(.+)", stem)
        if block:
            return f"blk.{block[1]}.{self.in_block[block[2]]}.{kind}", block[2]
        return f"{self.names[stem]}.{kind}", stem

    def hf_name(self, name: str) -> tuple[str, str] | None:
        """A weight's name in Hugging Face's files, as `gguf_name`; None: the family has no such."""
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
        table = self.in_block if block else self.names
        part = {theirs: ours for ours, theirs in table.items()}.get(block[2] if block else stem)
        if part is None:
            return None
        return (f"{self.layers}{block[1]}.{part}" if block else part) + f".{kind}", part


FAMILIES = (
    Family(
        model_type="gpt2",
        architecture="gpt2",
        numbers={
            "n_positions": "context_length",
            "n_embd": "embedding_length",
            "n_inner": "feed_forward_length",
            "n_layer": "block_count",
            "n_head": "attention.head_count",
            "layer_norm_epsilon": "attention.layer_norm_epsilon",
        },
        layers="transformer.h.",
        names={
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "transformer.ln_f": "output_norm",
            "lm_head": "output",
        },
        in_block={
            "ln_1": "attn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "ln_2": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        whole=("transformer.wpe",),
    ),
)
