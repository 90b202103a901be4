"""A model folder of Hugging Face's with its weights in another precision, one at a time."""

from __future__ import annotations

import json
from pathlib import Path

from gptray.model.rounding import dtype_of, rounded
from gptray.model.shape import WEIGHTS
from gptray.model.stored_weights import StoredModel
from gptray.model.tensor_file import write_tensors
from gptray.stored import read_foreign

_CONFIG = "config.json"


def write_hf(source: Path, folder: Path, model: StoredModel, *, precision: str) -> None:
    """Write a model's config and its weights. Raises UserError as `rounded`, OSError."""
    import torch

    dtype = dtype_of(precision)
    weights = model.weights
    shapes = {name: torch.Size(one.shape) for name, one in weights.items()}
    write_tensors(
        folder / WEIGHTS,
        shapes,
        lambda name: rounded(weights[name], dtype),
        {"format": "pt"},
        dtype=dtype,
    )
    config = read_foreign(source / _CONFIG)
    config.pop("torch_dtype", None)  # dtype's name in older files
    config |= {
        "architectures": [model.family.architecture],
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
