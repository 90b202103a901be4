"""Kernels for GPUs in Triton: products with quantized weights, for `gptray.generation.weight_only`.

A row of a result depends on no other row.
"""

import triton
import triton.language as tl

from gptray.model.packed_weights import GROUP
from gptray.model.quantized import IQ4_NL

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
        group = tl.zeros([1], dtype=tl.int32)
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
