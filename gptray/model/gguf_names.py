"""What GGUF calls a network's weights and numbers: a table for each family; no torch here.

The names are those that llama.cpp reads. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from gptray.config import UserError
from gptray.model.shape import MODEL_TYPES, NetworkShape
from gptray.model.stored_weights import HEAD, StoredWeight

# Bytes of so many weights: Q8_0 has a scale of two bytes for 32 of one byte.
BLOCKS = {"fp32": (4, 1), "fp16": (2, 1), "bf16": (2, 1), "q8_0": (34, 32)}


@dataclass(frozen=True)
class Family:
    """A family of networks: Hugging Face's names, without .weight and .bias, to GGUF's.

    architecture: llama.cpp's name. layers: what stands before a block's number. names: what is
    outside of blocks; in_block: what is in one. transposed: of in_block, linear layers that Hugging
    Face stores (in, out), and GGUF (out, in). whole: of names, tables that llama.cpp keeps in fp32.
    """

    architecture: str
    layers: str
    names: Mapping[str, str]
    in_block: Mapping[str, str]
    transposed: tuple[str, ...]
    whole: tuple[str, ...]

    def place(self, name: str) -> tuple[str, str]:
        """A weight's name in GGUF, and the part of its own that the tables have."""
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(re.escape(self.layers) + r"(\d+)\.(.+)", stem)
        if block:
            return f"blk.{block[1]}.{self.in_block[block[2]]}.{kind}", block[2]
        return f"{self.names[stem]}.{kind}", stem


FAMILIES = {
    "gpt2": Family(
        architecture="gpt2",
        layers="transformer.h.",
        names={
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "transformer.ln_f": "output_norm",
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
    )
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file; `shape` is NumPy's, with rows last. turned: stored transposed."""

    name: str
    stored: StoredWeight
    shape: tuple[int, ...]
    precision: str
    turned: bool

    @property
    def size(self) -> int:
        """Bytes, without padding."""
        size, weights = BLOCKS[self.precision]
        return math.prod(self.shape) // weights * size


def family_of(shape: NetworkShape) -> Family:
    """The family of a network. Raises UserError for one that llama.cpp has not."""
    model_type = MODEL_TYPES[shape["norm"], shape["residual"]]
    if model_type not in FAMILIES:
        what = "model.norm=none" if shape["norm"] == "none" else "model.residual=false"
        raise UserError(f"{what} makes a network of gptray's own, which no other program computes")
    return FAMILIES[model_type]


def gguf_numbers(shape: NetworkShape, family: Family) -> dict[str, object]:
    """The numbers of a network under GGUF's keys."""
    numbers = {
        "context_length": shape["n_positions"],
        "embedding_length": shape["n_embd"],
        "feed_forward_length": shape["n_inner"] or 4 * shape["n_embd"],
        "block_count": shape["n_layer"],
        "attention.head_count": shape["n_head"],
        "attention.layer_norm_epsilon": shape["layer_norm_epsilon"],
    }
    return {f"{family.architecture}.{key}": value for key, value in numbers.items()}


def gguf_tensors(
    family: Family, weights: Mapping[str, StoredWeight], precision: str
) -> list[GgufTensor]:
    """The tensors of a network's GGUF file. A copy of the tied head is not among them.

    Vectors and position tables stay in fp32. q8_0 needs rows of a multiple of 32 weights; other
    matrices are fp16 then, as in llama.cpp's own converters.
    """
    tensors = []
    for name, stored in sorted(weights.items()):
        if name == HEAD:
            continue
        gguf_name, part = family.place(name)
        turned = part in family.transposed and len(stored.shape) == 2
        shape = stored.shape[::-1] if turned else stored.shape
        own = precision
        if len(shape) == 1 or part in family.whole:
            own = "fp32"
        elif shape[-1] % BLOCKS[precision][1]:
            own = "fp16"
        tensors.append(GgufTensor(gguf_name, stored, shape, own, turned))
    return tensors
