"""What the graph decoder computes with Triton or, without it, with plain PyTorch.

Shapes: N rows, S slots, H heads in K groups that share keys and values, E = head width,
P positions.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from gptray.generation.philox import uniform

# Keys that a program reads at a time, and its warps for heads of 64: of 32 to 128 and of 1 to 8, near
# the fastest on an H200 for contexts of 80 and of 900 tokens.
BLOCK_KEYS, WARPS = 64, 2
# Rows that share a tile, the fewest that tensor cores take, and warps for 64 x 128 numbers of theirs.
TILE_ROWS, TILE_WARPS = 16, 4
_PHILOX_BLOCK = 128


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    *,
    window: int | None = None,
    tiles: Tensor | None = None,
) -> Tensor:
    """Store each row's key and value at its slot and position; attend to all up to there.

    qkv (N, (H + 2 K) E), q scaled; keys and values (S, K, P, E), contiguous; slots and positions
    (N,) int64. Rows of one slot see each other: all are stored first. Rows of the last slot are
    padding, and get zeros. window: how many positions back a row sees, its own included; None: all.
    tiles: (T,) int64, the first rows of tiles, for rows that lie beside others of their slot: a
    tile's rows are those of its first row's slot among TILE_ROWS; N where there is no tile.
    Returns (N, H E).
    """
    N, (S, K, P, E) = len(qkv), keys.shape
    H = qkv.size(1) // E - 2 * K
    kernels = kernels_for(qkv)
    if kernels is None:
        return _attend(qkv, keys, values, slots, positions, window)
    heads = {"H": H, "K": K, "E": E}
    kernels.store_kernel[(N,)](
        qkv, keys, values, slots, positions, P, **heads, WIDTH=_power_of_2(K * E)
    )
    sees, block = P if window is None else window, _power_of_2(E)
    if tiles is None:
        out = qkv.new_empty(N, H * E)
        kernels.attend_kernel[(N, H)](
            *(qkv, keys, values, slots, positions, out, P, S - 1, sees),
            **heads,
            BLOCK_E=block,
            BLOCK_K=BLOCK_KEYS,
            num_warps=WARPS * max(1, block // 64),
        )
        return out
    out = qkv.new_zeros(N, H * E)
    group = _power_of_2(H // K)
    kernels.attend_tile_kernel[(len(tiles), K)](
        *(qkv, keys, values, tiles, slots, positions, out, N, P, S - 1, sees),
        **heads,
        BLOCK_E=max(16, block),
        ROWS=TILE_ROWS,
        GROUP=group,
        BLOCK_K=BLOCK_KEYS,
        num_warps=TILE_WARPS * max(1, TILE_ROWS * group * block // (64 * 128)),
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


def _attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    window: int | None,
) -> Tensor:
    N, (S, K, _, E) = len(qkv), keys.shape
    H = qkv.size(1) // E - 2 * K
    q, k, v = torch.split(qkv.view(N, -1, E), [H, K, K], dim=1)
    keys[slots, :, positions] = k
    values[slots, :, positions] = v
    q = q.reshape(N, K, H // K, E)
    out = torch.zeros_like(q)
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        if slot == S - 1:
            continue  # padding
        first = 0 if window is None else max(0, position + 1 - window)
        past, carried = (kept[slot, :, first : position + 1].float() for kept in (keys, values))
        weights = torch.softmax(torch.einsum("kge,kpe->kgp", q[row].float(), past), dim=2)
        out[row] = torch.einsum("kgp,kpe->kge", weights, carried).to(out.dtype)
    return out.view(N, H * E)
