"""Safetensors files: reads headers without torch, and writes files one tensor at a time.

So a checkpoint does not need a second copy in memory.
https://huggingface.co/docs/safetensors, "Format": the header's length, the header, the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gptray.config import UserError
from gptray.storage.stored import Locked, Unreadable, is_whole, open_stored, parse_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# A header has about 200 bytes per tensor; GPT-2 XL has 580 tensors.
_MAX_HEADER_BYTES = 32 << 20
_MAX_DIMENSIONS = 8
# The beginning of the pointer file that git leaves without Git LFS.
_LFS_POINTER = b"version "
# The types of weights and their bytes per number; other types would be rounded.
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
# safetensors' names.
_NAMES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int32": "I32",
    "torch.int64": "I64",
}


class Header(NamedTuple):
    """The header of a file. tensors: the shape and type of each, by name."""

    tensors: dict[str, tuple[list[int], str]]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises UserError if it is damaged."""
    try:
        with open_stored(path) as file:
            data_bytes = os.fstat(file.fileno()).st_size - 8
            begin = file.read(8)
            if begin == _LFS_POINTER:
                raise Unreadable("it only points to the weights; `git lfs pull` fetches them")
            length = int.from_bytes(begin, "little")
            if length > _MAX_HEADER_BYTES:
                raise Unreadable(f"its header of {length:,} bytes is too large")
            if length > data_bytes:
                raise Unreadable("it ends within its header")
            entries = parse_json(file.read(length))
        if not isinstance(entries, dict):
            raise Unreadable("its header is not a JSON object")
        metadata = entries.pop("__metadata__", None) or {}
        if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
            raise Unreadable("its metadata is not text")
        return Header(_tensors(entries, data_bytes - length), metadata)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except Locked as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except Unreadable as error:
        raise UserError(f"{path}: damaged or incomplete: {error}") from None


def _tensors(entries: Mapping[str, object], data_bytes: int) -> dict[str, tuple[list[int], str]]:
    """Check a header's entries; `data_bytes`: bytes of data after it."""
    tensors = {}
    for name, entry in entries.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(dims), "data_offsets": [start, end]}:
                whole = all(is_whole(number) for number in (*dims, start, end))
                if not whole or len(dims) > _MAX_DIMENSIONS or not start <= end <= data_bytes:
                    raise Unreadable(f"{name} is outside the file")
                # A false shape would be allocated before it is read.
                if dtype in FLOATS and end - start != math.prod(dims) * FLOATS[dtype]:
                    raise Unreadable(f"{name} has {end - start:,} bytes, not shape {dims}")
                tensors[name] = (dims, dtype)
            case _:
                raise Unreadable(f"its header does not describe {name}")
    return tensors


def write_tensors(
    path: Path,
    shapes: Mapping[str, torch.Size],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write tensors of these shapes, byte for byte as safetensors' save_file does.

    tensor: returns a tensor by name, on any device; called once for each, in the order of names.
    dtypes: of each tensor; None: all fp32. Raises OSError.
    """
    import torch

    dtypes = dtypes or dict.fromkeys(shapes, torch.float32)
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + dtypes[name].itemsize * shape.numel()
        header[name] = {
            "dtype": _NAMES[str(dtypes[name])],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in sorted(shapes.items()):
            whole = tensor(name)
            assert whole.dtype == dtypes[name] and whole.shape == shape, name
            file.write(whole.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
