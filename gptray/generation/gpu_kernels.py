"""What the graph decoder computes with Triton or, without it, with plain PyTorch.

Shapes: N rows, S slots, H heads in K groups that share keys and values, E = head width,
P positions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from gptray.generation.philox import uniform
from gptray.generation.queries import Queries
from gptray.model import layers
from gptray.model.rotary import Angles

# Keys that a program reads at a time, and its warps for heads of 64: of 32 to 128 and of 1 to 8,
# near the fastest on an H200 for contexts of 80 and of 900 tokens.
BLOCK_KEYS, WARPS = 64, 2
# Keys of a chunk: several programs share the keys of a row that decodes, or a few of the GPU's
# processors would read all of a long context. And chunks merged at a time. Neither depends on the
# number of rows or on the length of others, or else a row's rounding would, too.
CHUNK_KEYS, MERGED_CHUNKS = 256, 16
# Rows that share a tile: the fewest that tensor cores take. The most numbers of queries, and of
# keys, in a tile, for which every GPU with tensor cores has room; and its warps.
TILE_ROWS, TILE_NUMBERS, TILE_WARPS = 16, 64 * 128, 4
# Numbers of a program.
_PHILOX_BLOCK, _GATED_BLOCK = 128, 1024
_formulas = ContextVar("_formulas", default=False)


def attend(
    qkv: Tensor,
    queries: Queries,
    angles: Angles | None,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    *,
    window: int | None = None,
    tiles: Tensor | None = None,
) -> Tensor:
    """Store each row's key and value at its slot and position; attend to all up to there.

    qkv (N, (H + 2 K) E), before `queries`; keys and values (S, K, P, E), contiguous; slots and
    positions (N,) int64. Rows of one slot see each other: all are stored first. Rows of the last
    slot are padding, and get zeros. window: how many positions back a row sees, its own included;
    None: all. tiles: (T,) int64, for rows that lie beside others of their slot: the first row of
    each tile, N where there is none; a tile's rows are those of the first one's slot among
    TILE_ROWS. Returns (N, H E).
    """
    kernels = kernels_for(qkv)
    if kernels is None:
        return _attend(queries(qkv, angles), keys, values, slots, positions, window)
    q, stride = _stored(kernels, qkv, queries, angles, keys, values, slots, positions)
    N, (_, K, P, E), H = len(qkv), keys.shape, queries.n_head
    past = _Past(keys, values, slots, positions, P if window is None else window)
    heads = {"Q_ROW": stride, "H": H, "K": K, "E": E}
    if tiles is None and P > CHUNK_KEYS:
        return _attend_split(kernels, q, past, heads)
    out = qkv.new_zeros(N, H * E)
    _attend_chunks(kernels, q, past, tiles, out, None, P, heads)
    return out


@dataclass(frozen=True)
class _Past:
    """What rows attend to, see `attend`."""

    keys: Tensor
    values: Tensor
    slots: Tensor
    positions: Tensor
    window: int

    @property
    def seen(self) -> tuple[int, int]:
        """The slot of padding, and the window."""
        return len(self.keys) - 1, self.window


def _attend_split(kernels: Kernels, q: Tensor, past: _Past, heads: dict[str, int]) -> Tensor:
    """Attend to chunks of CHUNK_KEYS keys, and merge them."""
    N, H, E, chunks = len(q), heads["H"], heads["E"], -(-past.keys.size(2) // CHUNK_KEYS)
    parts, sums = (q.new_empty(N, H, chunks, n, dtype=torch.float32) for n in (E, 1))
    _attend_chunks(kernels, q, past, None, parts, sums, CHUNK_KEYS, heads)
    out = q.new_empty(N, H * E)
    kernels.layers.merge_kernel[(N, H)](
        *(parts, sums, past.slots, past.positions, out, *past.seen, CHUNK_KEYS, chunks),
        E=E,
        BLOCK_E=_power_of_2(E),
        BLOCK_C=MERGED_CHUNKS,
    )
    return out


def _attend_chunks(
    kernels: Kernels,
    q: Tensor,
    past: _Past,
    tiles: Tensor | None,
    out: Tensor,
    sums: Tensor | None,
    chunk: int,
    heads: dict[str, int],
) -> None:
    """Attend to each chunk of `chunk` keys by itself; out and sums: see the kernels."""
    N, (_, K, P, E), H = len(q), past.keys.shape, heads["H"]
    block, chunks = _power_of_2(E), -(-P // chunk)
    where = past.slots, past.positions
    if not _has_tensor_cores(q) or (tiles is None and H == K):
        kernels.layers.attend_kernel[(N, H, chunks)](
            *(q, past.keys, past.values, *where, out, sums, P, *past.seen, chunk),
            **heads,
            BLOCK_E=block,
            BLOCK_K=BLOCK_KEYS,
            num_warps=WARPS * max(1, block // 64),
        )
        return
    block, rows = max(16, block), 1 if tiles is None else TILE_ROWS
    group = max(TILE_ROWS, min(TILE_NUMBERS // block, rows * _power_of_2(H // K))) // rows
    groups = -(-H // (K * group))
    kernels.layers.attend_tile_kernel[(N if tiles is None else len(tiles), K * groups, chunks)](
        *(q, past.keys, past.values, tiles, *where, out, sums, N, P, *past.seen, chunk),
        **heads,
        BLOCK_E=block,
        BLOCK_K=max(16, min(BLOCK_KEYS, TILE_NUMBERS // block)),
        ROWS=rows,
        GROUP=group,
        num_warps=TILE_WARPS,
    )


def _stored(
    kernels: Kernels,
    qkv: Tensor,
    queries: Queries,
    angles: Angles | None,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> tuple[Tensor, int]:
    """Store keys and values; return the queries of all rows, and their rows' stride."""
    if queries.is_wide:
        qkv = queries.wide_norm(qkv, rms_norm)
    has_norms = queries.norms is not None and not queries.is_wide
    N, (_, K, P, E), H = len(qkv), keys.shape, queries.n_head
    heads, width = {"H": H, "K": K, "E": E}, (H + 2 * K) * E
    if queries.norms is None and angles is None:
        kernels.layers.store_kernel[(N,)](
            *(qkv, keys, values, slots, positions, P), **heads, WIDTH=_power_of_2(K * E)
        )
        return qkv, width
    q = qkv.new_empty(N, H * E)
    cos, sin = angles or (qkv, qkv)
    kernels.layers.turn_kernel[(N, H + 2 * K)](
        *(qkv, queries.norms if has_norms else qkv, cos, sin),
        *(q, keys, values, slots, positions, P, queries.eps),
        **heads,
        BLOCK_E=_power_of_2(E),
        HAS_NORMS=has_norms,
        HALF=cos.size(1) if angles else 0,
        num_warps=1,
    )
    return q, H * E


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`gptray.model.layers.rms_norm` of x (N, C)."""
    kernels = kernels_for(x)
    if kernels is None:
        return layers.rms_norm(x, weight, eps)
    x, (N, C) = x.contiguous(), x.shape
    out = torch.empty_like(x)
    block = _power_of_2(C)
    warps = min(8, max(1, block // 512))
    kernels.layers.rms_norm_kernel[(N,)](x, weight, out, C, eps, BLOCK=block, num_warps=warps)
    return out


def gated(x: Tensor, kind: str) -> Tensor:
    """`gptray.model.layers.activation` of swiglu or geglu, of x (N, 2 W)."""
    kernels = kernels_for(x)
    if kernels is None:
        return layers.activation(x, kind)
    N, width = len(x), x.size(1) // 2
    out = x.new_empty(N, width)
    grid = (-(-out.numel() // _GATED_BLOCK),)
    kernels.layers.gated_kernel[grid](
        x, out, N, width, IS_SWIGLU=kind == "swiglu", BLOCK=_GATED_BLOCK
    )
    return out


def random_numbers(seeds: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """`gptray.generation.philox.uniform` of (N,) int64 each, where they are."""
    kernels = kernels_for(seeds)
    if kernels is None:
        return uniform(seeds.tolist(), rows.tolist(), positions.tolist())
    out = torch.empty_like(seeds, dtype=torch.float64)
    grid = (-(-len(seeds) // _PHILOX_BLOCK),)
    kernels.layers.philox_kernel[grid](seeds, rows, positions, out, len(seeds), BLOCK=_PHILOX_BLOCK)
    return out


@contextmanager
def formulas() -> Iterator[None]:
    """Compute by the formulas of kernels, to compare the two."""
    token = _formulas.set(True)
    try:
        yield
    finally:
        _formulas.reset(token)


@dataclass(frozen=True)
class Kernels:
    """The modules of kernels; interpreted: TRITON_INTERPRET runs them on a CPU."""

    layers: ModuleType
    weights: ModuleType
    adapters: ModuleType
    interpreted: bool


def kernels_for(tensor: Tensor) -> Kernels | None:
    """Kernels for a tensor; None: the formulas. Raises ImportError on a GPU without Triton."""
    kernels = _triton_kernels()
    if _formulas.get():
        return None
    if tensor.is_cuda:
        if kernels is None:
            raise ImportError("Triton is not installed")
        return kernels
    return kernels if kernels and kernels.interpreted else None


@cache
def _triton_kernels() -> Kernels | None:
    # Triton takes a while to import, and comes with any PyTorch for GPUs: an engine on the CPU of
    # such a machine does without. A product and a sum may round once: unless that is said, Triton
    # 3.9 warns, and 3.10 rounds twice.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        from gptray.generation import triton_adapters, triton_layers, triton_weights
    except ImportError:
        return None
    is_interpreted = triton_layers.is_interpreted()
    return Kernels(triton_layers, triton_weights, triton_adapters, is_interpreted)


def _has_tensor_cores(numbers: Tensor) -> bool:
    """Whether Triton multiplies blocks of such numbers on tensor cores."""
    if numbers.dtype not in (torch.bfloat16, torch.float16):
        return False
    return not numbers.is_cuda or torch.cuda.get_device_capability(numbers.device) >= (8, 0)


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
