"""Kernels for GPUs in Triton: adapters' low-rank products, for `gptray.generation.gpu_adapters`.

Both kernels take tiles of rows that share an adapter on tensor cores. A row of a result depends on
no other row, and not on the ranks of other rows' adapters.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(adapters, slots, tiles, N, layer, ROWS: tl.constexpr):
    # A tile's rows, which of them are its own, and its adapter's entry for the layer: rank, A, B^T.
    number = tl.arange(0, ROWS)
    if tiles is None:
        first = tl.program_id(0).to(tl.int64)
        row = first + number
        is_row = number == 0
    else:
        first = tl.load(tiles + tl.program_id(0))
        row = first + number
        slot = tl.load(slots + first, mask=first < N, other=-1)
        is_row = tl.load(slots + row, mask=row < N, other=-2) == slot
    table = tl.load(adapters + first, mask=first < N, other=0)
    return row, is_row, table.to(tl.pointer_type(tl.int64)) + 3 * layer, table != 0


@triton.jit(do_not_specialize=["layer"])
def shrink_kernel(
    x, adapters, slots, tiles, sums, N, K, ROOM, layer,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # x A^T of one chunk of the inputs, in fp32: sums (N, chunks, ROOM).
    row, is_row, entry, has_adapter = _tile(adapters, slots, tiles, N, layer, ROWS)
    rank = tl.load(entry, mask=has_adapter, other=0).to(tl.int32)
    if rank == 0:
        return
    a = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(x.dtype.element_ty)), 16)
    part = tl.program_id(1)
    source = x + row[:, None] * K
    target = sums + (row * tl.num_programs(1) + part)[:, None] * ROOM
    for first in range(0, rank, RANKS):
        ranks = first + tl.arange(0, RANKS)
        is_rank = ranks < rank
        total = tl.zeros([ROWS, RANKS], dtype=tl.float32)
        for start in range(part * CHUNK, tl.minimum(K, (part + 1) * CHUNK), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            is_input = k < K
            met = tl.load(source + k[None, :], mask=is_row[:, None] & is_input[None, :], other=0.0)
            weights = tl.load(
                a + ranks[None, :] * K + k[:, None],
                mask=is_rank[None, :] & is_input[:, None],
                other=0.0,
            )
            total = tl.dot(met, weights, total, input_precision="ieee")
        tl.store(target + ranks[None, :], total, mask=is_row[:, None] & is_rank[None, :])


@triton.jit(do_not_specialize=["layer"])
def expand_kernel(
    sums, adapters, slots, tiles, y, N, OUT, ROOM, layer,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Adds to y (N, OUT) what the sums make with B. They are rounded to its dtype before.
    dtype: tl.constexpr = y.dtype.element_ty
    row, is_row, entry, has_adapter = _tile(adapters, slots, tiles, N, layer, ROWS)
    rank = tl.load(entry, mask=has_adapter, other=0).to(tl.int32)
    if rank == 0:
        return
    b = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(dtype)), 16)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = output < OUT
    source = sums + row[:, None] * CHUNKS * ROOM
    total = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    for first in range(0, rank, RANKS):
        ranks = first + tl.arange(0, RANKS)
        is_rank = ranks < rank
        narrow = tl.zeros([ROWS, RANKS], dtype=tl.float32)
        for part in range(CHUNKS):
            narrow += tl.load(
                source + part * ROOM + ranks[None, :],
                mask=is_row[:, None] & is_rank[None, :],
                other=0.0,
            )
        weights = tl.load(
            b + ranks[:, None] * OUT + output[None, :],
            mask=is_rank[:, None] & is_output[None, :],
            other=0.0,
        )
        total = tl.dot(narrow.to(dtype), weights, total, input_precision="ieee")
    target, is_real = y + row[:, None] * OUT + output[None, :], is_row[:, None] & is_output[None, :]
    before = tl.load(target, mask=is_real, other=0.0).to(tl.float32)
    tl.store(target, (before + total).to(dtype), mask=is_real)
