"""Products with weights in few bits on a GPU, by Triton's kernels.

A weight is its value times its scale in fp32, rounded once to what x is in, as `dequantize` makes
it; products are summed in fp32, and rounded once. Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from gptray.generation.gpu_kernels import kernels_for
from gptray.model.quantized import QuantizedWeight

# Of the program that makes weights whole.
_OUTPUTS, _INPUTS = 8, 256
# The fewest rows that tensor cores multiply, and the most of a program.
_LEAST_ROWS, _MOST_ROWS = 16, 64


@dataclass(frozen=True)
class Tile:
    """What a program multiplies: `rows` of x, `outputs` rows of the weight, `inputs` at a time.

    A warp has 16 outputs: with more warps than that two would make the same weights whole.
    """

    rows: int
    outputs: int
    inputs: int

    @property
    def warps(self) -> int:
        return self.outputs // 16


def tiles_for(rows: int, dtype: torch.dtype) -> dict[str, Tile]:
    """What may be the fastest for so many rows in a dtype, by name."""
    block = min(_MOST_ROWS, max(_LEAST_ROWS, 1 << (rows - 1).bit_length()))
    tiles = {"wide": Tile(block, 64, 256 // dtype.itemsize)}
    if block < _MOST_ROWS:  # small products need many programs; x must fit beside the weights
        tiles["narrow"] = Tile(block, 16, 512 // dtype.itemsize)
    return tiles


def dequantized(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """`weight.dequantize(dtype)`, to the bit, in one pass. Raises ImportError without Triton."""
    N, K = len(weight.values), weight.inputs
    out = torch.empty(N, K, dtype=dtype, device=weight.values.device)
    _kernels(out).dequantize_kernel[(-(-N // _OUTPUTS), -(-K // _INPUTS))](
        *(weight.values, weight.scales, out),
        *(N, K, *_widths(weight)),
        KIND=weight.kind,
        BLOCK_N=_OUTPUTS,
        BLOCK_K=_INPUTS,
    )
    return out


def multiply(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, tile: Tile) -> Tensor:
    """x (M, K) by the weight (N, K), transposed, plus bias (N,): (M, N) in x's dtype.

    A row depends on that row of x alone, whatever M is. Raises ImportError without Triton.
    """
    (M, K), N, kernels = x.shape, len(weight.values), _kernels(x)
    out = x.new_empty(M, N)
    kernels.multiply_kernel[(-(-M // tile.rows), -(-N // tile.outputs))](
        *(x.contiguous(), weight.values, weight.scales, bias, out),
        *(M, N, K, *_widths(weight)),
        KIND=weight.kind,
        HAS_BIAS=bias is not None,
        IN_FP32=kernels.is_interpreted(),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.inputs,
        num_warps=tile.warps,
        num_stages=4,
    )
    return out


def _kernels(tensor: Tensor) -> ModuleType:
    kernels = kernels_for(tensor)
    assert kernels, "neither on a GPU nor interpreted"
    return kernels


def _widths(weight: QuantizedWeight) -> tuple[int, int]:
    """Bytes and scales of a row."""
    return weight.values.size(1), weight.scales.size(1)
