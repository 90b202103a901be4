"""Weights from files, one at a time, rounded to what an export asks for.

torch is imported where weights are read: to plan an export takes none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from gptray.config import UserError
from gptray.model.stored_weights import StoredModel, StoredWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of a precision; of one that torch has not, such as q8_0, that of its input."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


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
    """A weight as it is stored. Raises UserError for a file that is damaged."""
    try:
        with safe_open(stored.path, framework="pt") as file:
            weight: Tensor = file.get_tensor(stored.key)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{stored.path}: damaged or incomplete: {error}") from None
    return weight
