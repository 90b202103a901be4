"""Weights from files, one at a time, rounded to what an export asks for.

torch is imported only where weights are read, because planning an export does not need it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from gptray.config import UserError
from gptray.model.packed_weights import SCALES, VALUES, Packing
from gptray.model.stored_weights import StoredModel, StoredWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of a precision; of GGUF's own, such as q8_0, that of its input. In int8 and int4 it
    is that of scales and of what is not quantized."""
    import torch

    half = dict.fromkeys(("fp16", "int8", "int4"), torch.float16)
    return {**half, "bf16": torch.bfloat16}.get(precision, torch.float32)


def rounded(stored: StoredWeight, dtype: torch.dtype) -> Tensor:
    """A weight in a dtype, the nearest value of each element, ties to even.

    Raises UserError for a file that is damaged, and for numbers that are not finite or beyond the
    dtype's.
    """
    import torch

    weight = read_weight(stored)
    result = weight.to(dtype)
    if bool(torch.isfinite(result).all()):
        return result
    if bool(torch.isfinite(weight.float()).all()):
        raise UserError(
            f"{stored.path}: {stored.key} has numbers beyond {torch.finfo(dtype).max:,.0f}, the "
            "largest of fp16; choose export.precision=bf16"
        )
    raise UserError(
        f"{stored.path}: {stored.key} is not finite: the weights are damaged, or training diverged"
    )


def check_tied(model: StoredModel) -> None:
    """Refuse a model whose copy of a tied head, if it has one, is not the embedding.

    Raises UserError.
    """
    head = model.copy
    if head and not read_weight(head).float().equal(read_weight(model.embedding).float()):
        raise UserError(f"{head.path}: {head.key} is not the embedding, but config.json ties them")


def read_weight(stored: StoredWeight) -> Tensor:
    """A weight as it is stored, a packed one in fp32. Raises UserError for a damaged file."""
    if stored.packing is None:
        return _read(stored.path, stored.key)
    assert stored.scales
    values = _read(stored.path, stored.key + VALUES)
    return unpacked(values, _read(stored.scales, stored.key + SCALES), stored.packing)


def _read(path: Path, key: str) -> Tensor:
    # Opened anew: what was read of a mapped file counts as memory until it is closed.
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or incomplete: {error}") from None
    return tensor


def unpacked(values: Tensor, scales: Tensor, packing: Packing) -> Tensor:
    """The weight (out, in) in fp32 of values (out, words), int32, and scales (out, groups)."""
    import torch

    rows, inputs = len(values), packing.inputs(values.size(1), scales.size(1))
    numbers = values.contiguous().view(torch.uint8)
    if packing.bits == 4:
        numbers = torch.stack((numbers & 15, numbers >> 4), dim=-1).flatten(1)
    signed = numbers[:, :inputs].float() - 2 ** (packing.bits - 1)
    groups: Tensor = signed.view(rows, scales.size(1), -1) * scales.float()[..., None]
    return groups.view(rows, -1)
