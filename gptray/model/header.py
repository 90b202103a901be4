"""Compares the headers of weight files with config.json before a model is built.

Otherwise a config that promises more than its files hold would be built first, layer by layer.
Needs no torch, so that a job can refuse a folder at once; `gptray.model.hf` reads the weights.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from gptray.config import ModelConfig, UserError
from gptray.model.hf_config import family_in
from gptray.model.packed_weights import SCALES, SHAPE, VALUES, Packing, packing_of
from gptray.model.parameters import HEAD, IGNORED, stored_name, stored_parts
from gptray.model.shape import weight_files
from gptray.stored import Unreadable, is_whole, open_stored, parse_json

# A header has some 200 bytes for each tensor; GPT-2 XL has 580 tensors.
_MAX_HEADER_BYTES = 32 << 20
_MOST_DIMENSIONS = 8
# Bytes of each number. Other types would be rounded, or are not weights.
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}

Stored = tuple[Path, list[int], str]


def check_weights(folder: Path, shape: ModelConfig) -> None:
    """Refuse a folder whose weight files are damaged or do not fit its network, see `read_shape`.

    Reads only headers.

    Raises:
        UserError: names the file, and the first weight that is missing, misshapen or strange.
    """
    family = family_in(folder)
    stored = {}
    for path in weight_files(folder):
        for name, (dims, dtype) in read_header(path).items():
            stored[stored_name(name, family)] = (path, dims, dtype)
    if packing := packing_of(folder / "config.json"):
        _join_packed(stored, packing)
    first = family.prefix + family.layers
    layer = re.compile(re.escape(first) + r"(\d{1,9})\.")
    found = {int(match[1]) for name in stored if (match := layer.match(name))}
    if found and len(found) != shape.n_layer:
        raise UserError(
            f"{folder / 'config.json'}: {family.keys['n_layer'].name}={shape.n_layer}, but the "
            f"weights have {len(found)} layer{'s' if len(found) > 1 else ''}"
        )
    if not found and shape.n_layer:
        raise UserError(f"{folder}: {first}0 is missing from the weights")
    for part in stored_parts(shape, family, shape.rows):
        _compare(folder, part.name, stored.pop(part.name, None), part.dims)
    for name, (path, _, _) in stored.items():
        # A tied head may have its copy; `gptray.model.hf` compares the two.
        if not (name.endswith(IGNORED) or (name == HEAD and shape.tie_word_embeddings)):
            raise UserError(f"{path}: {name} is not a weight of this network")


def _join_packed(stored: dict[str, Stored], packing: Packing) -> None:
    """Put the weight that packed values and scales stand for in their place."""
    for name in [name for name in stored if name.endswith(".weight" + VALUES)]:
        weight = name.removesuffix(VALUES)
        scales = stored.pop(weight + SCALES, None)
        path, dims, _ = stored.pop(name)
        stored.pop(weight + SHAPE, None)
        if scales and len(dims) == len(scales[1]) == 2:
            inputs = packing.inputs(dims[1], scales[1][1])
            stored[weight] = (path, [dims[0], inputs], "F32")


def _compare(folder: Path, name: str, stored: Stored | None, expected: list[int]) -> None:
    if stored is None:
        raise UserError(f"{folder}: {name} is missing from the weights")
    path, dims, dtype = stored
    if dims != expected:
        raise UserError(f"{path}: {name} has shape {dims}, but config.json says {expected}")
    if dtype not in FLOATS:
        raise UserError(f"{path}: {name} is stored as {dtype}; weights are {', '.join(FLOATS)}")


def read_header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and type of each tensor in a safetensors file. Raises UserError if it is damaged."""
    try:
        with open_stored(path) as file:
            room = os.fstat(file.fileno()).st_size - 8
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise Unreadable(f"its header of {length:,} bytes is too large")
            if length > room:
                raise Unreadable("it ends within its header")
            entries = parse_json(file.read(length))
        return _tensors(entries, room - length)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (Unreadable, OSError) as error:
        raise UserError(f"{path}: damaged or incomplete: {error}") from None


def _tensors(entries: object, room: int) -> dict[str, tuple[list[int], str]]:
    """The checked entries of a header; `room`: bytes of data after it."""
    if not isinstance(entries, dict):
        raise Unreadable("its header is not a JSON object")
    tensors = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(dtype), "shape": list(dims), "data_offsets": [start, end]}:
                whole = all(is_whole(number) for number in (*dims, start, end))
                if not whole or len(dims) > _MOST_DIMENSIONS or not start <= end <= room:
                    raise Unreadable(f"{name} is outside the file")
                # A shape that is not in the file would be given memory before it is read.
                if dtype in FLOATS and end - start != math.prod(dims) * FLOATS[dtype]:
                    raise Unreadable(f"{name} has {end - start:,} bytes, not shape {dims}")
                tensors[name] = (dims, dtype)
            case _:
                raise Unreadable(f"its header does not describe {name}")
    return tensors
