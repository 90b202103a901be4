"""What the graph decoder computes with Triton or, without it, with plain PyTorch.

Shapes: N rows, S slots, H heads, E = head width, P positions.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from gptray.generation.philox import uniform

# Keys that a program reads at a time, and its warps: of 32 to 128 and of 1 to 8, near the fastest
# on an H200 for heads of 64 and contexts of 80 and of 900 tokens. Wider heads may want more warps.
BLOCK_KEYS, WARPS = 64, 2
_PHILOX_BLOCK = 128


def attend(qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """Store each row's key and value at its slot and position; attend to all up to there.

    qkv (N, 3HE), q scaled; keys and values (S, H, P, E), contiguous; slots and positions (N,)
    int64. Rows of one slot see each other: all are stored first. Rows of the last slot are padding,
    and get zeros. Returns (N, HE).
    """
    N, (S, H, P, E) = len(qkv), keys.shape
    kernels = kernels_for(qkv)
    if kernels is None:
        return _attend(qkv, keys, values, slots, positions)
    out = qkv.new_empty(N, H * E)
    width, block = _power_of_2(H * E), _power_of_2(E)
    kernels.store_kernel[(N,)](qkv, keys, values, slots, positions, P, H=H, E=E, WIDTH=width)
    places = slots, positions, out, P, S - 1
    kernels.attend_kernel[(N, H)](
        qkv, keys, values, *places, H=H, E=E, BLOCK_E=block, BLOCK_K=BLOCK_KEYS, num_warps=WARPS
    )
    return out


def random_numbers(seeds: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """`gptray.generation.philox.uniform` of (N,) int64 each, where they are."""
    kernels = kernels_for(seeds)
    if kernels is None:
        return uniform(seeds.tolist(), rows.tolist(), positions.tolist())
    out = torch.empty_like(seeds, dtype=torch.float64)
    grid = (-(-len(seeds) // _PHILOX_BLOCK),)
    kernels.philox_kernel[grid](seeds, rows, positions, out, len(seeds), BLOCK=_PHILOX_BLOCK)
    return out


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The kernels' module; None: the formulas. Raises ImportError on a GPU without Triton."""
    kernels = _triton_kernels()
    if tensor.is_cuda:
        if kernels is None:
            raise ImportError("Triton is not installed")
        return kernels
    return kernels if kernels and kernels.is_interpreted() else None


@cache
def _triton_kernels() -> ModuleType | None:
    # Triton takes a while to import, and comes with any PyTorch for GPUs: an engine on the CPU of
    # such a machine does without.
    try:
        from gptray.generation import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _attend(qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    N, (_, H, _, E) = len(qkv), keys.shape
    q, k, v = qkv.view(N, 3, H, E).unbind(1)
    keys[slots, :, positions] = k
    values[slots, :, positions] = v
    out = torch.zeros_like(q)
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        if slot == len(keys) - 1:
            continue  # padding
        past, carried = (kept[slot, :, : position + 1].float() for kept in (keys, values))
        weights = torch.softmax(torch.einsum("he,hpe->hp", q[row].float(), past), dim=1)
        out[row] = torch.einsum("hp,hpe->he", weights, carried).to(out.dtype)
    return out.view(N, H * E)
