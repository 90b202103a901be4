"""Write safetensors one tensor at a time: a checkpoint needs no second copy of what is in memory.

https://huggingface.co/docs/safetensors, "Format": the length of the header, the header, the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor


def write_tensors(
    path: Path,
    shapes: Mapping[str, torch.Size],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write fp32 tensors of these shapes, byte for byte as safetensors' save_file does.

    tensor: gives a tensor by its name, on any device; called once for each, in order of the names.
    Raises OSError.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in sorted(shapes.items()):
            whole = tensor(name)
            assert whole.dtype == torch.float32 and whole.shape == shape, name
            file.write(whole.cpu().contiguous().view(-1).numpy().data)
