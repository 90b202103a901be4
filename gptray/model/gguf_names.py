"""What the GGUF file of a network holds, by name, shape and precision; no torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gptray.config import UserError
from gptray.gguf_families import FAMILIES, Family
from gptray.model.families import KNOWN
from gptray.model.hf_config import NetworkShape
from gptray.model.stored_weights import StoredModel, StoredWeight

# Bytes of so many weights: Q8_0 has a scale of two bytes for 32 of one byte.
BLOCKS = {"fp32": (4, 1), "fp16": (2, 1), "bf16": (2, 1), "q8_0": (34, 32)}


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


def family_of(model: StoredModel) -> Family:
    """The family of a network. Raises UserError for one that is not written as GGUF."""
    for family in FAMILIES:
        if family.model_type == model.model_type and model.shape["mlp"] == "gelu_new":
            return family
    if model.model_type in KNOWN:
        raise UserError(
            f"GGUF files are written of GPT-2's network, not of {model.model_type}'s with "
            f"{model.shape['mlp']}; export.format=hf takes it"
        )
    raise own_network(model)


def own_network(model: StoredModel) -> UserError:
    """What to say of a network that is gptray's own."""
    return UserError(
        f"its model_type {model.model_type} is gptray's own, which no other program computes"
    )


def gguf_numbers(shape: NetworkShape, family: Family) -> dict[str, object]:
    """The numbers of a network under GGUF's keys."""
    numbers = {**shape, "n_inner": shape["n_inner"] or 4 * shape["n_embd"]}
    return {f"{family.architecture}.{key}": numbers[name] for name, key in family.numbers.items()}


def gguf_tensors(
    family: Family, weights: Mapping[str, StoredWeight], precision: str
) -> list[GgufTensor]:
    """The tensors of a network's GGUF file.

    Vectors and position tables stay in fp32. q8_0 needs rows of a multiple of 32 weights; other
    matrices are fp16 then, as in llama.cpp's own converters.
    """
    tensors = []
    for name, stored in sorted(weights.items()):
        gguf_name, part = family.gguf_name(name)
        turned = part in family.transposed and len(stored.shape) == 2
        shape = stored.shape[::-1] if turned else stored.shape
        own = precision
        if len(shape) == 1 or part in family.whole:
            own = "fp32"
        elif shape[-1] % BLOCKS[precision][1]:
            own = "fp16"
        tensors.append(GgufTensor(gguf_name, stored, shape, own, turned))
    return tensors
