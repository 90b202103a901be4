"""Writes a Hugging Face folder with a model's weights in another precision, one at a time."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from gptray.model.packed_weights import (
    KEY,
    PACKINGS,
    SCALES,
    SHAPE,
    VALUES,
    packed_config,
)
from gptray.model.rounding import dtype_of, rounded
from gptray.model.shape import WEIGHTS
from gptray.model.stored_weights import StoredModel, StoredWeight
from gptray.model.tensor_file import write_tensors
from gptray.storage.stored import read_foreign

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gptray.model.importance import Quantizer

_CONFIG = "config.json"


def write_hf(
    source: Path,
    folder: Path,
    model: StoredModel,
    *,
    precision: str,
    quantized: Quantizer,
) -> None:
    """Write a model's config and weights. quantized: makes the quantized weights.

    Raises UserError as `rounded` does, and OSError.
    """
    dtype, packing = dtype_of(precision), PACKINGS.get(precision)
    packed = model.packable if packing else {}
    shapes, dtypes = _layout(model, precision, packed)

    @lru_cache(maxsize=1)  # a weight's parts are written one after the other
    def parts(name: str) -> dict[str, Tensor]:
        return _packed(model.weights[name], precision, quantized)

    def tensor(name: str) -> Tensor:
        weight, end, kind = name.rpartition(".weight")
        if weight + end in packed:
            return parts(weight + end)[kind]
        return rounded(model.weights[name], dtype)

    write_tensors(folder / WEIGHTS, shapes, tensor, {"format": "pt"}, dtypes=dtypes)
    config = read_foreign(source / _CONFIG)
    for key in ("torch_dtype", KEY):  # an older name of dtype; the source's quantization
        config.pop(key, None)
    config |= {
        "architectures": [model.family.architecture],
        "dtype": str(dtype).removeprefix("torch."),
    }
    if packing:
        others = [name.removesuffix(".weight") for name in model.linear if name not in packed]
        config[KEY] = packed_config(packing, others=others)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _layout(
    model: StoredModel, precision: str, packed: Collection[str]
) -> tuple[dict[str, torch.Size], dict[str, torch.dtype]]:
    """The shape and the dtype of each tensor, by name."""
    import torch

    shapes, dtypes = dict[str, torch.Size](), dict[str, torch.dtype]()
    for name, one in model.weights.items():
        if name not in packed:
            shapes[name], dtypes[name] = torch.Size(one.shape), dtype_of(precision)
            continue
        (rows, inputs), packing = one.shape, PACKINGS[precision]
        shapes[name + VALUES] = torch.Size((rows, packing.words(inputs)))
        shapes[name + SCALES] = torch.Size((rows, packing.groups(inputs)))
        shapes[name + SHAPE] = torch.Size((2,))
        kinds = torch.int32, torch.float16, torch.int64
        dtypes |= {
            name + end: kind for end, kind in zip((VALUES, SCALES, SHAPE), kinds, strict=True)
        }
    return shapes, dtypes


def _packed(stored: StoredWeight, kind: str, quantized: Quantizer) -> dict[str, Tensor]:
    """The tensors of a packed weight, by the ends of their names."""
    import torch

    held = quantized(stored, False)
    values = held.values
    if kind == "int8":  # int4 values are already packed and unsigned
        values = (values.to(torch.int16) + 128).to(torch.uint8)
    return {
        VALUES: values.view(torch.int32),
        SCALES: held.scales,
        SHAPE: torch.tensor(stored.shape),
    }
