"""Compares the headers of weight files with config.json before a model is built.

Otherwise a config that promises more than its files hold would be built first, layer by layer.
Needs no torch, so that a job can refuse a folder at once; `gptray.model.hf` reads the weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from gptray.config import UserError
from gptray.model.shape import PREFIX, NetworkShape, weight_files
from gptray.stored import Unreadable, is_whole, open_stored, parse_json

# A header has some 200 bytes for each tensor; GPT-2 XL has 580 tensors.
_MAX_HEADER_BYTES = 32 << 20
# Other types would be rounded, or are not weights.
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

Stored = tuple[Path, list[int], str]


def check_weights(folder: Path, shape: NetworkShape) -> None:
    """Refuse a folder whose weight files are damaged or do not fit the network `shape`.

    Reads only headers. shape: ModelConfig's fields, as `read_shape` gives them.

    Raises:
        UserError: names the file, and the first weight that is missing or misshapen.
    """
    stored = {}
    for path in weight_files(folder):
        for name, (dims, dtype) in _header(path).items():
            stored[name if name.startswith(PREFIX) else PREFIX + name] = (path, dims, dtype)
    found = {int(match[1]) for name in stored if (match := _LAYER.match(name))}
    if found and len(found) != shape["n_layer"]:
        raise UserError(
            f"{folder / 'config.json'}: n_layer={shape['n_layer']}, but the weights have "
            f"{len(found)} layer{'s' if len(found) > 1 else ''}"
        )
    if not found and shape["n_layer"]:
        raise UserError(f"{folder}: {PREFIX}h.0 is missing from the weights")
    for name, expected in _expected(shape):
        _compare(folder, name, stored.get(name), expected)


_LAYER = re.compile(re.escape(PREFIX) + r"h\.(\d{1,9})\.")


def _compare(folder: Path, name: str, stored: Stored | None, expected: list[int]) -> None:
    if stored is None:
        raise UserError(f"{folder}: {name} is missing from the weights")
    path, dims, dtype = stored
    if dims != expected:
        raise UserError(f"{path}: {name} has shape {dims}, but config.json says {expected}")
    if dtype not in _FLOATS:
        raise UserError(f"{path}: {name} is stored as {dtype}; weights are {', '.join(_FLOATS)}")


def _expected(shape: NetworkShape) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of a network's weights as stored in files, linear layers (in, out)."""
    width, inner = shape["n_embd"], shape["n_inner"] or 4 * shape["n_embd"]
    linears = {
        "attn.c_attn": [width, 3 * width],
        "attn.c_proj": [width, width],
        "mlp.c_fc": [width, inner],
        "mlp.c_proj": [inner, width],
    }
    norms = shape["norm"] == "layernorm"
    yield PREFIX + "wte.weight", [shape["vocab_size"], width]
    yield PREFIX + "wpe.weight", [shape["n_positions"], width]
    for layer in range(shape["n_layer"]):
        for name, dims in linears.items():
            yield f"{PREFIX}h.{layer}.{name}.weight", dims
            yield f"{PREFIX}h.{layer}.{name}.bias", dims[1:]
        for norm in ("ln_1", "ln_2") if norms else ():
            yield f"{PREFIX}h.{layer}.{norm}.weight", [width]
            yield f"{PREFIX}h.{layer}.{norm}.bias", [width]
    if norms:
        yield PREFIX + "ln_f.weight", [width]
        yield PREFIX + "ln_f.bias", [width]


def _header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and type of each tensor in a safetensors file. Raises UserError if it is damaged."""
    try:
        with open_stored(path) as file:
            room = os.fstat(file.fileno()).st_size - 8
            length = int.from_bytes(file.read(8), "little")
            if length > min(room, _MAX_HEADER_BYTES):
                raise Unreadable(f"its header of {length:,} bytes is too large")
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
                if not whole or not start <= end <= room:
                    raise Unreadable(f"{name} is outside the file")
                tensors[name] = (dims, dtype)
            case _:
                raise Unreadable(f"its header does not describe {name}")
    return tensors
