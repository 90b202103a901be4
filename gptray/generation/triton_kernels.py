"""Kernels for GPUs in Triton; `gptray.generation.gpu_kernels` and `weight_only` say what they
compute.

Nothing depends on a neighbouring row: what is summed for a row is that row's alone, in blocks that
begin at multiples of BLOCK_K.
"""

import triton
import triton.language as tl

from gptray.generation.philox import MULTIPLIERS, ROUNDS, WEYL
from gptray.model.packed_weights import GROUP
from gptray.model.quantized import IQ4_NL


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
def attend_kernel(
    qkv, keys, values, slots, positions, out, P, spare, window,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Softmax in one pass over the keys (Milakov & Gimelshein 2018; Dao et al. 2022).
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    length = tl.where(slot == spare, 0, tl.load(positions + row).to(tl.int32) + 1)
    first = tl.maximum(length - window, 0)
    base = (slot * K + head // (H // K)) * P * E
    keys += base
    values += base
    place = tl.arange(0, BLOCK_E)
    is_real = place < E
    q = tl.load(qkv + row * (H + 2 * K) * E + head * E + place, mask=is_real, other=0.0)
    q = q.to(tl.float32)
    most, total = float("-inf"), 0.0
    carried = tl.zeros([BLOCK_E], dtype=tl.float32)
    for start in range(first // BLOCK_K * BLOCK_K, length, BLOCK_K):
        position = start + tl.arange(0, BLOCK_K)
        is_seen = (position >= first) & (position < length)
        block = position[:, None] * E + place[None, :]
        mask = is_seen[:, None] & is_real[None, :]
        k = tl.load(keys + block, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(is_seen, tl.sum(k * q[None, :], axis=1), float("-inf"))
        above = tl.maximum(most, tl.max(scores, axis=0))
        scale, weights = tl.exp(most - above), tl.exp(scores - above)
        v = tl.load(values + block, mask=mask, other=0.0).to(tl.float32)
        carried = carried * scale + tl.sum(weights[:, None] * v, axis=0)
        total = total * scale + tl.sum(weights, axis=0)
        most = above
    result = (carried / tl.where(length > 0, total, 1.0)).to(out.dtype.element_ty)
    tl.store(out + row * H * E + head * E + place, result, mask=is_real)


@triton.jit
def attend_tile_kernel(
    qkv, keys, values, tiles, slots, positions, out, N, P, spare, window,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # As above for up to ROWS rows of one slot at a time and all heads that share keys, on tensor
    # cores. GROUP: the power of 2 from so many heads on.
    first_row, kv_head = tl.load(tiles + tl.program_id(0)), tl.program_id(1)
    slot = tl.load(slots + first_row, mask=first_row < N, other=spare)
    number, place = tl.arange(0, ROWS * GROUP), tl.arange(0, BLOCK_E)
    row, head = first_row + number // GROUP, number % GROUP
    is_own = tl.load(slots + row, mask=row < N, other=spare) == slot
    is_row = is_own & (slot != spare) & (head < H // K)
    position = tl.load(positions + row, mask=row < N, other=0).to(tl.int32)
    length = tl.where(is_row, position + 1, 0)
    first, most_keys = tl.maximum(length - window, 0), tl.max(length, axis=0)
    least = tl.min(tl.where(is_row, first, most_keys), axis=0)
    base = (slot * K + kv_head) * P * E
    keys += base
    values += base
    head += kv_head * (H // K)
    is_real = place < E
    source = qkv + row[:, None] * (H + 2 * K) * E + head[:, None] * E + place[None, :]
    is_query = is_row[:, None] & is_real[None, :]
    q = tl.load(source, mask=is_query, other=0.0)
    most = tl.full([ROWS * GROUP], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS * GROUP], dtype=tl.float32)
    carried = tl.zeros([ROWS * GROUP, BLOCK_E], dtype=tl.float32)
    for start in range(least // BLOCK_K * BLOCK_K, most_keys, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        is_stored = key < most_keys
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
    result = (carried / tl.where(is_row, total, 1.0)[:, None]).to(out.dtype.element_ty)
    target = out + row[:, None] * H * E + head[:, None] * E + place[None, :]
    tl.store(target, result, mask=is_query)


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


_GROUP = tl.constexpr(GROUP)
_C0, _C1, _C2, _C3, _C4 = (tl.constexpr(n) for n in IQ4_NL)
# 2^23, its bits, and what rounds to whole numbers where it is added and taken away again.
_2_23, _BITS, _ROUNDING = (tl.constexpr(n) for n in (8388608.0, 0x4B000000, 12582912.0))


@triton.jit
def _value(code, KIND: tl.constexpr):
    # A code of 4 bits becomes real as the last bits of 2^23: GPUs are slow to convert integers.
    value = (code | _BITS).to(tl.float32, bitcast=True) - (_2_23 + 8)
    if KIND == "iq4_nl":
        value = _C0 + value * (_C1 + value * (_C2 + value * (_C3 + value * _C4)))
        value = (value + _ROUNDING) - _ROUNDING
    return value


@triton.jit
def _values(held, like, KIND: tl.constexpr, UNPACK: tl.constexpr):
    # The values of both halves of some bytes, in the dtype of `like`.
    if UNPACK is None:
        code = held.to(tl.int32)
        low, high = _value(code & 15, KIND), _value((code >> 4) & 15, KIND)
        return low.to(like.dtype), high.to(like.dtype)
    return tl.inline_asm_elementwise(
        UNPACK, "=r,=r,=r,=r,r", [held], dtype=(like.dtype, like.dtype), is_pure=True, pack=4
    )


@triton.jit
def dequantize_kernel(
    values, scales, out, N, K, WIDTH,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Blocks of a group's inputs, so that a scale meets its weights without moving them.
    outputs = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None, None]
    BLOCKS: tl.constexpr = BLOCK_K // _GROUP
    group = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[None, :, None]
    place = group * _GROUP + tl.arange(0, _GROUP)[None, None, :]
    row, is_real = outputs.to(tl.int64), (outputs < N) & (place < WIDTH)
    held = tl.load(values + row * WIDTH + place, mask=is_real, other=0)
    target = out + row * K + place
    if KIND == "int8":
        scale = tl.load(scales + outputs, mask=outputs < N, other=0.0)
        whole = held.to(tl.float32) * scale.to(tl.float32)
        tl.store(target, whole.to(out.dtype.element_ty), mask=is_real)
    else:
        code = held.to(tl.int32)
        has_scale = (outputs < N) & (group * _GROUP < WIDTH)
        at = scales + group * N + outputs
        low = tl.load(at, mask=has_scale, other=0.0).to(tl.float32)
        high = tl.load(at + WIDTH // _GROUP * N, mask=has_scale, other=0.0).to(tl.float32)
        low, high = _value(code & 15, KIND) * low, _value((code >> 4) & 15, KIND) * high
        tl.store(target, low.to(out.dtype.element_ty), mask=is_real & (place < K))
        is_real = is_real & (place + WIDTH < K)
        tl.store(target + WIDTH, high.to(out.dtype.element_ty), mask=is_real)


@triton.jit
def _scales(scales, group, output, N, GROUPS):
    # Of both halves of a group of bytes.
    at, is_real = scales + group * N + output, group < GROUPS
    return tl.load(at, mask=is_real, other=0.0), tl.load(at + GROUPS * N, mask=is_real, other=0.0)


@triton.jit(do_not_specialize=["M"])  # which changes from step to step
def multiply_kernel(
    x, values, scales, bias, out, M, N, K, WIDTH,
    KIND: tl.constexpr, UNPACK: tl.constexpr, HAS_BIAS: tl.constexpr, IN_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    # Some rows of the weight by some of x: a part of the result, transposed. The weight comes
    # first, for it goes to the tensor cores from registers. SLICES: 1, or as many as warps: each
    # has inputs of its own, and their sums meet at the end. IN_FP32: for the interpreter, which
    # has no arithmetic in bf16; products of bf16 are exact in fp32.
    dtype: tl.constexpr = tl.float32 if IN_FP32 else x.dtype.element_ty
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    output, place = tl.minimum(outputs, N - 1), tl.arange(0, STEP)
    byte, k = place[None, :], place[:, None]
    if SLICES == 1:
        group = 0
        total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    else:
        group = tl.arange(0, SLICES)[:, None]
        byte, k = byte + group[:, :, None] * STEP, k + group[:, :, None] * STEP
        total = tl.zeros([SLICES, BLOCK_N, BLOCK_M], dtype=tl.float32)
    source = values + output.to(tl.int64)[:, None] * WIDTH + byte
    part = x + rows.to(tl.int64) * K + k
    GROUPS = WIDTH // STEP
    if KIND != "int8":
        low_scale, high_scale = _scales(scales, group, output, N, GROUPS)
    for start in range(0, WIDTH, SLICES * STEP):
        held = tl.load(source + start, mask=byte + start < WIDTH, other=0)
        met = tl.load(part + start, mask=(rows < M) & (k + start < K), other=0.0).to(dtype)
        if KIND == "int8":
            total = tl.dot(held.to(dtype), met, total)
        else:
            at = start + WIDTH
            far = tl.load(part + at, mask=(rows < M) & (k + at < K), other=0.0).to(dtype)
            # Scales are asked for a step before they are needed; two, and Triton would load nothing
            # ahead, which it does with what goes into dots.
            after = start // STEP + SLICES + group
            low_next, high_next = _scales(scales, after, output, N, GROUPS)
            low, high = _values(held, met, KIND, UNPACK)
            total += tl.dot(low, met) * tl.expand_dims(low_scale.to(tl.float32), -1)
            total += tl.dot(high, far) * tl.expand_dims(high_scale.to(tl.float32), -1)
            low_scale, high_scale = low_next, high_next
    if SLICES > 1:
        total = tl.sum(total, axis=0)
    if KIND == "int8":
        total *= tl.load(scales + output).to(tl.float32)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + output).to(tl.float32)[:, None]
    target = out + rows.to(tl.int64) * N + outputs[:, None]
    is_real = (rows < M) & (outputs[:, None] < N)
    tl.store(target, total.to(out.dtype.element_ty), mask=is_real)
