"""Write safetensors one tensor at a time: a checkpoint needs no second copy of what is in memory.

https://huggingface.co/docs/safetensors, "Format": the length of the header, the header, the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# safetensors' names.
_NAMES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int32": "I32",
    "torch.int64": "I64",
}


def write_tensors(
    path: Path,
    shapes: Mapping[str, torch.Size],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write tensors of these shapes, byte for byte as safetensors' save_file does.

    tensor: gives a tensor by its name, on any device; called once for each, in order of the names.
    dtypes: of each of them; None: fp32. Raises OSError.
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
