"""The tensors of a network's GGUF file, by name, shape and precision; no torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gptray.config import ModelConfig, UserError
from gptray.gguf.naming import Family
from gptray.gguf.naming_table import EMBEDDING, FAMILIES, HEAD
from gptray.gguf.network_config import OTHER_SCORES, rotary_factors, rotary_fields
from gptray.model.families import KNOWN
from gptray.model.hf_config import network_json
from gptray.model.stored_weights import StoredModel, StoredWeight

# GGUF's 4-bit precisions, and the kind of `gptray.model.quantized` for each.
FOUR_BITS = {"q4_0": "int4", "iq4_nl": "iq4_nl"}
# (bytes, weights) of a block: Q8_0 has a scale of two bytes for 32 weights of one byte, the 4-bit
# precisions for 32 of half a byte.
BLOCKS = {
    **{"fp32": (4, 1), "fp16": (2, 1), "bf16": (2, 1), "q8_0": (34, 32)},
    **dict.fromkeys(FOUR_BITS, (18, 32)),
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file; `shape` is NumPy's, with rows last.

    transposed: the folder stores it transposed. order: for each of its rows, the row in the folder.
    more: what the file's numbers are above the folder's.
    """

    name: str
    stored: StoredWeight
    shape: tuple[int, ...]
    precision: str
    transposed: bool
    order: list[int] | None
    more: int = 0

    @property
    def size(self) -> int:
        """The size in bytes, without padding."""
        size, weights = BLOCKS[self.precision]
        return math.prod(self.shape) // weights * size


def family_of(model: StoredModel) -> Family:
    """The family of a network. Raises UserError for one that cannot be written as GGUF."""
    if model.model_type not in KNOWN:
        raise own_network(model)
    for family in FAMILIES:
        if family.model_type == model.model_type:
            _check_computed(model.shape, family)
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(f"GGUF export supports {known}, not {model.model_type}; export.format=hf does")


def _check_computed(config: ModelConfig, family: Family) -> None:
    """Raise UserError for a network that llama.cpp cannot compute."""
    layers = range(config.n_layer)
    windows, rotates = ([one(layer) for layer in layers] for one in (config.window, config.rotates))
    rotated = [family.architecture != "smollm3" or layer % 4 < 3 for layer in layers]
    refused = None
    if family.pattern and (other := _other_gemma(config, family.pattern)):
        refused = other
    elif not family.pattern and any(one and one < config.n_positions for one in windows):
        refused = f"sliding windows, and this model has one of {config.sliding_window} tokens"
    elif family.architecture == "gpt2" and config.mlp != "gelu_new":
        refused = f"{config.mlp} in the MLP"
    elif family.is_strict and not (config.qkv_bias and config.attn_out_bias and config.mlp_bias):
        refused = "layers without a bias"
    elif family.is_tied and not config.tie_word_embeddings:
        refused = "a head that is not the embedding"
    elif family.is_rotary and rotates != rotated:
        refused = "these layers without positions"
    elif config.rope_scaling and (kind := config.rope_scaling["rope_type"]) not in family.scalings:
        refused = f"rope_scaling of rope_type {kind}"
    if refused:
        raise UserError(
            f"llama.cpp's {family.architecture} does not support {refused}; export.format=hf does"
        )


def _other_gemma(config: ModelConfig, pattern: int) -> str | None:
    """What llama.cpp's gemma3 does differently from this network."""
    has_window = [config.window(layer) is not None for layer in range(config.n_layer)]
    if has_window != [(layer + 1) % pattern != 0 for layer in range(config.n_layer)]:
        return f"sliding windows in other layers than all but every {pattern}th"
    if config.local_rope_theta != 10000:
        return f"local_rope_theta={config.local_rope_theta}"
    return f"{OTHER_SCORES} layers" if config.n_layer == OTHER_SCORES else None


def own_network(model: StoredModel) -> UserError:
    """The error for a network that is gptray's own."""
    return UserError(
        f"its model_type {model.model_type} is gptray's own, which no other program can run"
    )


def gguf_numbers(config: ModelConfig, family: Family) -> dict[str, object]:
    """A network's numbers by GGUF's keys. Raises UserError as `rotary_fields` does."""
    numbers = network_json(config, family.model_type)
    fields = {key: numbers[name] for name, key in family.numbers.items()}
    if config.n_inner is None:
        fields["feed_forward_length"] = config.inner
    if "head_dim" in family.numbers:
        fields["attention.value_length"] = config.head_width
    if family.pattern:
        fields["attention.sliding_window"] = config.sliding_window
    if family.is_rotary:
        fields |= rotary_fields(config.rope_theta, config.rotary_width, config.rope_scaling)
    return {f"{family.architecture}.{key}": value for key, value in fields.items()}


def gguf_tensors(family: Family, model: StoredModel, precision: str) -> list[GgufTensor]:
    """The tensors of a network's GGUF file, except those of `gguf_vectors`.

    Vectors and position tables stay in fp32. q8_0, q4_0 and iq4_nl need rows of a multiple of 32
    weights; other matrices become fp16, as in llama.cpp's own converters. With 4 bits, embedding
    and head, on which the loss depends most, are q8_0. Raises UserError for a bias that the family
    does not have.
    """
    numbers = network_json(model.shape, family.model_type)
    tensors = []
    for name, stored in sorted(model.weights.items()):
        gguf_name, part = family.gguf_name(name)
        if name.endswith(".bias") and part in family.in_block and part not in family.biased:
            raise UserError(f"llama.cpp's {family.architecture} does not support a bias of {part}")
        transposed = part in family.transposed and len(stored.shape) == 2
        shape = stored.shape[::-1] if transposed else stored.shape
        own = precision
        if len(shape) == 1 or part in family.whole:
            own = "fp32"
        elif shape[-1] % BLOCKS[precision][1]:
            own = "fp16"
        elif precision in FOUR_BITS and gguf_name in (EMBEDDING, HEAD):
            own = "q8_0"
        order = family.row_order(part, shape[0], numbers)
        more = 1 if family.is_centred and len(shape) == 1 else 0
        tensors.append(GgufTensor(gguf_name, stored, shape, own, transposed, order, more))
    if family.needs_head and HEAD not in {one.name for one in tensors}:
        embedding = next(one for one in tensors if one.name == EMBEDDING)
        tensors.append(replace(embedding, name=HEAD))
    return tensors


def gguf_vectors(config: ModelConfig) -> dict[str, list[float]]:
    """What a GGUF file holds as tensors and Hugging Face as numbers: scalings of positions."""
    return rotary_factors(config.rope_theta, config.rotary_width, config.rope_scaling)
