"""Reads weights from files, one at a time, and rounds them to the precision of an export.

torch is imported only when weights are read, because planning an export does not need it.
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
    """The dtype of an export's precision: for GGUF's own, such as q8_0, that of the quantizer's
    input; for int8 and int4, that of the scales and of weights that are not quantized."""
    import torch

    half = dict.fromkeys(("fp16", "int8", "int4"), torch.float16)
    return {**half, "bf16": torch.bfloat16}.get(precision, torch.float32)


def rounded(stored: StoredWeight, dtype: torch.dtype) -> Tensor:
    """A weight in a dtype, rounded to nearest, ties to even.

    Raises UserError for a damaged file, and for numbers that are not finite or overflow the dtype.
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
    """Raise UserError for a model that stores a tied head which is not the embedding."""
    head = model.copy
    if head and not read_weight(head).float().equal(read_weight(model.embedding).float()):
        raise UserError(f"{head.path}: {head.key} is not the embedding, but config.json ties them")


def read_weight(stored: StoredWeight) -> Tensor:
    """A weight as stored, or in fp32 if it is packed. Raises UserError for a damaged file."""
    if stored.packing is None:
        return _read(stored.path, stored.key)
    assert stored.scales
    values = _read(stored.path, stored.key + VALUES)
    return unpacked(values, _read(stored.scales, stored.key + SCALES), stored.packing)


def _read(path: Path, key: str) -> Tensor:
    # Opened each time: pages that were read from a mapped file count as memory until it is closed.
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or incomplete: {error}") from None
    return tensor


def unpacked(values: Tensor, scales: Tensor, packing: Packing) -> Tensor:
    """The weight (out, in) in fp32 from values (out, words), int32, and scales (out, groups)."""
    import torch

    rows, inputs = len(values), packing.inputs(values.size(1), scales.size(1))
    numbers = values.contiguous().view(torch.uint8)
    if packing.bits == 4:
        numbers = torch.stack((numbers & 15, numbers >> 4), dim=-1).flatten(1)
    signed = numbers[:, :inputs].float() - 2 ** (packing.bits - 1)
    groups: Tensor = signed.view(rows, scales.size(1), -1) * scales.float()[..., None]
    return groups.view(rows, -1)
