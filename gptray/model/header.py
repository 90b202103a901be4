"""Compares the headers of weight files with config.json before a model is built.

Otherwise a huge config would be built, layer by layer, before its files turned out not to fit.
Without torch, so a job can refuse a folder at once; `gptray.model.hf` reads the weights.
"""

from __future__ import annotations

import re
from pathlib import Path

from gptray.config import ModelConfig, UserError
from gptray.model.hf_config import family_in
from gptray.model.parameters import HEAD, IGNORED, Part, stored_name, stored_parts
from gptray.model.stored_weights import StoredWeight, stored_weights
from gptray.model.tensor_file import FLOATS
from gptray.wording import count


def check_weights(folder: Path, shape: ModelConfig) -> None:
    """Raise UserError if a folder's weight files are damaged or do not fit `shape`.

    Reads only headers. Names the file, and the first weight that is missing, misshapen or unknown.
    """
    family = family_in(folder)
    stored = {stored_name(one.key, family): one for one in stored_weights(folder)}
    first = family.prefix + family.layers
    layer = re.compile(re.escape(first) + r"(\d{1,9})\.")
    found = {int(match[1]) for name in stored if (match := layer.match(name))}
    if found and len(found) != shape.n_layer:
        raise UserError(
            f"{folder / 'config.json'}: {family.keys['n_layer'].name}={shape.n_layer}, but the "
            f"weights have {count(len(found), 'layer')}"
        )
    if not found and shape.n_layer:
        raise UserError(f"{folder}: {first}0 is missing from the weights")
    for part in stored_parts(shape, family, shape.rows):
        _compare(folder, part, stored.pop(part.name, None))
    for name, one in stored.items():
        # A tied head may be stored too; `gptray.model.hf` compares it with the embedding.
        if not (name.endswith(IGNORED) or (name == HEAD and shape.tie_word_embeddings)):
            raise UserError(f"{one.path}: {name} is not a weight of this network")


def _compare(folder: Path, part: Part, stored: StoredWeight | None) -> None:
    if stored is None:
        raise UserError(f"{folder}: {part.name} is missing from the weights")
    path, dims, dtype = stored.path, list(stored.shape), stored.dtype
    if dims != part.dims:
        raise UserError(f"{path}: {part.name} has shape {dims}, but config.json says {part.dims}")
    if dtype not in FLOATS:
        known = ", ".join(FLOATS)
        raise UserError(f"{path}: {part.name} is stored as {dtype}; weights are {known}")
