"""Kernels for GPUs in Triton: layers and random numbers, for `gptray.generation.gpu_kernels`.

A row of a result depends on no other row: keys are summed in blocks that begin at multiples of
BLOCK_K, and in chunks of the same length for every row.
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
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot, position = tl.load(slots + row), tl.load(positions + row)
    number = tl.arange(0, WIDTH)
    is_real = number < K * E
    head, place = number // E, number % E
    target = ((slot * K + head) * P + position) * E + place
    source = qkv + row * (H + 2 * K) * E + H * E + number
    tl.store(keys + target, tl.load(source, mask=is_real), mask=is_real)
    tl.store(values + target, tl.load(source + K * E, mask=is_real), mask=is_real)


@triton.jit
def turn_kernel(
    qkv, norms, cos, sin, queries, keys, values, slots, positions, P, eps,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    HAS_NORMS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # One head of a row: queries and keys are normalised, then rotated in pairs that are HALF apart.
    dtype: tl.constexpr = qkv.dtype.element_ty
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, BLOCK_E)
    is_real = place < E
    source = qkv + (row * (H + 2 * K) + head) * E
    x = tl.load(source + place, mask=is_real, other=0.0).to(tl.float32)
    if head < H + K:
        other = tl.where(
            place < HALF, place + HALF, tl.where(place < 2 * HALF, place - HALF, place)
        )
        y = tl.load(source + other, mask=is_real, other=0.0).to(tl.float32)
        if HAS_NORMS:
            inverse = tl.rsqrt(tl.sum(x * x, axis=0) / E + eps)
            weights = norms + (head >= H) * E
            w = tl.load(weights + place, mask=is_real, other=0.0).to(tl.float32)
            w_other = tl.load(weights + other, mask=is_real, other=0.0).to(tl.float32)
            x = ((x * inverse).to(dtype).to(tl.float32) * w).to(dtype).to(tl.float32)
            y = ((y * inverse).to(dtype).to(tl.float32) * w_other).to(dtype).to(tl.float32)
        if HALF > 0:
            turns, angle = place < 2 * HALF, row * HALF + place % HALF
            c = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
            s = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
            x = x * c + tl.where(place < HALF, -y, y) * s
    if head < H:
        tl.store(queries + (row * H + head) * E + place, x.to(dtype), mask=is_real)
    else:
        slot, position = tl.load(slots + row), tl.load(positions + row)
        target = ((slot * K + (head - H) % K) * P + position) * E + place
        if head < H + K:
            tl.store(keys + target, x.to(dtype), mask=is_real)
        else:
            tl.store(values + target, x.to(dtype), mask=is_real)


@triton.jit
def rms_norm_kernel(x, weight, out, C, eps, BLOCK: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    is_real = place < C
    number = tl.load(x + row * C + place, mask=is_real, other=0.0).to(tl.float32)
    normed = number * tl.rsqrt(tl.sum(number * number, axis=0) / C + eps)
    normed = normed.to(out.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + place, mask=is_real, other=0.0).to(tl.float32)
    tl.store(out + row * C + place, (normed * w).to(out.dtype.element_ty), mask=is_real)


@triton.jit
def gated_kernel(x, out, N, WIDTH, IS_SWIGLU: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_real = number < N * WIDTH
    source = x + number // WIDTH * 2 * WIDTH + number % WIDTH
    gate = tl.load(source, mask=is_real, other=0.0).to(tl.float32)
    inner = tl.load(source + WIDTH, mask=is_real, other=0.0).to(tl.float32)
    # silu(z) = z s(z), and GELU by tanh is z s(2 t), s the logistic function.
    inside = gate if IS_SWIGLU else 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    gate = (gate / (1.0 + tl.exp(-inside))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + number, (gate * inner).to(out.dtype.element_ty), mask=is_real)


@triton.jit
def _added(most, total, carried, scores, values):
    # One more block of a softmax's sums: scores (B,) and values (B, E).
    above = tl.maximum(most, tl.max(scores, axis=0))
    scale, weights = tl.exp(most - above), tl.exp(scores - above)
    carried = carried * scale + tl.sum(weights[:, None] * values, axis=0)
    return above, total * scale + tl.sum(weights, axis=0), carried


@triton.jit
def attend_kernel(
    queries, keys, values, slots, positions, out, sums, P, spare, window, chunk,
    Q_ROW: tl.constexpr, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Softmax in one pass over the keys (Milakov & Gimelshein 2018; Dao et al. 2022): one head of a
    # row and one chunk of keys. out (N, H, chunks, E); sums (N, H, chunks): the logarithm of the
    # sum of exponentials, None if there is one chunk. What sees no key writes nothing.
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row)
    length = tl.where(slot == spare, 0, tl.load(positions + row).to(tl.int32) + 1)
    first = tl.maximum(length - window, 0)
    begin = tl.maximum(first // BLOCK_K * BLOCK_K, part * chunk)
    end = tl.minimum(length, (part + 1) * chunk)
    if begin >= end:
        return
    base = (slot * K + head // (H // K)) * P * E
    keys, values = keys + base, values + base
    place = tl.arange(0, BLOCK_E)
    is_real = place < E
    q = tl.load(queries + row * Q_ROW + head * E + place, mask=is_real, other=0.0)
    q = q.to(tl.float32)
    most, total = float("-inf"), 0.0
    carried = tl.zeros([BLOCK_E], dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        position = start + tl.arange(0, BLOCK_K)
        is_seen = (position >= first) & (position < length)
        block = position[:, None] * E + place[None, :]
        mask = is_seen[:, None] & is_real[None, :]
        k = tl.load(keys + block, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(is_seen, tl.sum(k * q[None, :], axis=1), float("-inf"))
        v = tl.load(values + block, mask=mask, other=0.0).to(tl.float32)
        most, total, carried = _added(most, total, carried, scores, v)
    target = (row * H + head) * tl.num_programs(2) + part
    result = (carried / total).to(out.dtype.element_ty)
    tl.store(out + target * E + place, result, mask=is_real)
    if sums is not None:
        tl.store(sums + target, most + tl.log(total))


@triton.jit
def attend_tile_kernel(
    queries, keys, values, tiles, slots, positions, out, sums, N, P, spare, window, chunk,
    Q_ROW: tl.constexpr, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # As above for up to ROWS rows of one slot at a time and GROUP of the heads that share keys, on
    # tensor cores. tiles: None if each row is one.
    tile, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    kv_head, group = tl.program_id(1) % K, tl.program_id(1) // K
    first_row = tile if tiles is None else tl.load(tiles + tile)
    slot = tl.load(slots + first_row, mask=first_row < N, other=spare)
    number, place = tl.arange(0, ROWS * GROUP), tl.arange(0, BLOCK_E)
    row, head = first_row + number // GROUP, group * GROUP + number % GROUP
    own = tl.load(slots + row, mask=row < N, other=spare)
    is_row = (own == slot) & (own != spare) & (head < H // K)
    position = tl.load(positions + row, mask=row < N, other=0).to(tl.int32)
    length = tl.where(is_row, position + 1, 0)
    first, most_keys = tl.maximum(length - window, 0), tl.max(length, axis=0)
    least = tl.min(tl.where(is_row, first, most_keys), axis=0)
    begin = tl.maximum(least // BLOCK_K * BLOCK_K, part * chunk)
    end = tl.minimum(most_keys, (part + 1) * chunk)
    if begin >= end:
        return
    base = (slot * K + kv_head) * P * E
    keys, values = keys + base, values + base
    head += kv_head * (H // K)
    is_real = place < E
    source = queries + row[:, None] * Q_ROW + head[:, None] * E + place[None, :]
    is_query = is_row[:, None] & is_real[None, :]
    q = tl.load(source, mask=is_query, other=0.0)
    most = tl.full([ROWS * GROUP], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS * GROUP], dtype=tl.float32)
    carried = tl.zeros([ROWS * GROUP, BLOCK_E], dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        is_stored = key < end
        k = tl.load(
            keys + key[None, :] * E + place[:, None],
            mask=is_stored[None, :] & is_real[:, None],
            other=0.0,
        )
        is_seen = (key[None, :] >= first[:, None]) & (key[None, :] < length[:, None])
        scores = tl.where(is_seen, tl.dot(q, k, input_precision="ieee"), float("-inf"))
        above = tl.maximum(most, tl.max(scores, axis=1))
        finite = tl.where(above == float("-inf"), 0.0, above)  # of a row that sees nothing yet
        scale, weights = tl.exp(most - finite), tl.exp(scores - finite[:, None])
        v = tl.load(
            values + key[:, None] * E + place[None, :],
            mask=is_stored[:, None] & is_real[None, :],
            other=0.0,
        )
        carried = tl.dot(weights.to(v.dtype), v, carried * scale[:, None], input_precision="ieee")
        total = total * scale + tl.sum(weights, axis=1)
        most = above
    total = tl.where(is_row, total, 1.0)
    target = (row * H + head) * tl.num_programs(2) + part
    result = (carried / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + target[:, None] * E + place[None, :], result, mask=is_query)
    if sums is not None:
        tl.store(sums + target, most + tl.log(total), mask=is_row)


@triton.jit
def merge_kernel(
    parts, sums, slots, positions, out, spare, window, chunk, CHUNKS,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # What one head of a row attended to, from its chunks of keys (Flash-Decoding, Dao et al. 2023):
    # a softmax over the logarithms of their sums.
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    length = tl.where(slot == spare, 0, tl.load(positions + row).to(tl.int32) + 1)
    first, end = tl.maximum(length - window, 0) // chunk, tl.cdiv(length, chunk)
    target, place = row * tl.num_programs(1) + head, tl.arange(0, BLOCK_E)
    parts += target * CHUNKS * E
    sums += target * CHUNKS
    is_real = place < E
    most, total = float("-inf"), 0.0
    carried = tl.zeros([BLOCK_E], dtype=tl.float32)
    for start in range(first // BLOCK_C * BLOCK_C, end, BLOCK_C):
        number = start + tl.arange(0, BLOCK_C)
        is_seen = (number >= first) & (number < end)
        scores = tl.load(sums + number, mask=is_seen, other=float("-inf"))
        block = number[:, None] * E + place[None, :]
        part = tl.load(parts + block, mask=is_seen[:, None] & is_real[None, :], other=0.0)
        most, total, carried = _added(most, total, carried, scores, part)
    result = (carried / tl.where(length > 0, total, 1.0)).to(out.dtype.element_ty)
    tl.store(out + target * E + place, result, mask=is_real)


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
