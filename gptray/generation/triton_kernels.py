"""Kernels for GPUs in Triton; `gptray.generation.gpu_kernels` says what they compute.

Nothing depends on a neighbouring row: each program works on one row, and sums its keys in blocks
that begin at multiples of BLOCK_K.
"""

import triton
import triton.language as tl

from gptray.generation.philox import MULTIPLIERS, ROUNDS, WEYL


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET runs the kernels on a CPU."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def store_kernel(
    qkv, keys, values, slots, positions, P,
    H: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot, position = tl.load(slots + row), tl.load(positions + row)
    number = tl.arange(0, WIDTH)
    is_real = number < H * E
    head, place = number // E, number % E
    target = ((slot * H + head) * P + position) * E + place
    source = qkv + row * 3 * H * E + number
    tl.store(keys + target, tl.load(source + H * E, mask=is_real), mask=is_real)
    tl.store(values + target, tl.load(source + 2 * H * E, mask=is_real), mask=is_real)


@triton.jit
def attend_kernel(
    qkv, keys, values, slots, positions, out, P, spare,
    H: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Softmax in one pass over the keys (Milakov & Gimelshein 2018; Dao et al. 2022).
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    length = tl.where(slot == spare, 0, tl.load(positions + row) + 1)
    base = (slot * H + head) * P * E
    place = tl.arange(0, BLOCK_E)
    is_real = place < E
    q = tl.load(qkv + row * 3 * H * E + head * E + place, mask=is_real, other=0.0)
    q = q.to(tl.float32)
    most, total = float("-inf"), 0.0
    carried = tl.zeros([BLOCK_E], dtype=tl.float32)
    for start in range(0, length, BLOCK_K):
        position = start + tl.arange(0, BLOCK_K)
        is_past = position < length
        block = base + position[:, None] * E + place[None, :]
        mask = is_past[:, None] & is_real[None, :]
        k = tl.load(keys + block, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(is_past, tl.sum(k * q[None, :], axis=1), float("-inf"))
        above = tl.maximum(most, tl.max(scores, axis=0))
        scale, weights = tl.exp(most - above), tl.exp(scores - above)
        v = tl.load(values + block, mask=mask, other=0.0).to(tl.float32)
        carried = carried * scale + tl.sum(weights[:, None] * v, axis=0)
        total = total * scale + tl.sum(weights, axis=0)
        most = above
    result = (carried / tl.where(length > 0, total, 1.0)).to(out.dtype.element_ty)
    tl.store(out + row * H * E + head * E + place, result, mask=is_real)


_ROUNDS, _M0, _M1 = (tl.constexpr(n) for n in (ROUNDS, *MULTIPLIERS))
_W0, _W1 = (tl.constexpr(n) for n in WEYL)


@triton.jit
def philox_kernel(seeds, rows, positions, out, N, BLOCK: tl.constexpr):
    low: tl.constexpr = 0xFFFFFFFF
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_real = place < N
    seed = tl.load(seeds + place, mask=is_real, other=0)
    row = tl.load(rows + place, mask=is_real, other=0)
    position = tl.load(positions + place, mask=is_real, other=0)
    k0, k1 = seed & low, (seed >> 32) & low
    c0, c1, c2, c3 = position & low, (position >> 32) & low, row & low, (row >> 32) & low
    for _ in tl.static_range(_ROUNDS):
        # Signed products wrap around, with the bits of unsigned ones.
        first, second = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((second >> 32) & low) ^ c1 ^ k0,
            second & low,
            ((first >> 32) & low) ^ c3 ^ k1,
            first & low,
        )
        k0, k1 = (k0 + _W0) & low, (k1 + _W1) & low
    bits = (c0 << 21) | (c1 >> 11)
    tl.store(out + place, bits.to(tl.float64) * 1.1102230246251565e-16, mask=is_real)  # 2^-53
