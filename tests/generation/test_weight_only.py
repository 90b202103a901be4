"""Triton's kernels for weights in few bits: by Triton's interpreter on a CPU, or on a GPU.

TRITON_INTERPRET=1 python -m pytest tests/generation/test_weight_only.py
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from gptray.generation.weight_only import Tile, dequantized, multiply, tiles_for
from gptray.model.packed_weights import PACKINGS
from gptray.model.quantized import CODES, IQ4_NL, quantize

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
KINDS = pytest.mark.parametrize("kind", PACKINGS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
needs_kernels = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(),
    reason="needs a GPU, or Triton and TRITON_INTERPRET=1",
)
# What the interpreter loses of a number in bf16, which it rounds towards zero.
TRUNCATED = torch.finfo(torch.bfloat16).eps
# Outputs and inputs: whole blocks, and numbers that are multiples of nothing.
SHAPES = [(64, 256), (3, 32), (67, 131), (130, 289)]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE)


@needs_kernels
@KINDS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_become_whole_to_the_bit(
    kind: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = quantize(numbers(*shape), kind)
    found, whole = dequantized(weight, dtype), weight.dequantize(dtype)
    if IS_INTERPRETED and dtype == torch.bfloat16:
        torch.testing.assert_close(found, whole, rtol=TRUNCATED, atol=0)
    else:
        assert torch.equal(found, whole)


@needs_kernels
@KINDS
@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 17, 64, 70])
def test_products_are_those_with_whole_weights(kind: str, dtype: torch.dtype, rows: int) -> None:
    for N, K in SHAPES:
        weight, bias = quantize(numbers(N, K), kind), numbers(N, seed=1).to(dtype)
        x = numbers(rows, K, seed=2).to(dtype)
        whole = weight.dequantize(dtype).double()
        for added in (None, bias):
            exact = F.linear(x.double(), whole, None if added is None else added.double())
            # The sum's own error, and half a unit in the last place of what it is rounded to.
            room = 1e-5 * exact.abs().max() + exact.abs() * torch.finfo(dtype).eps / 2
            if IS_INTERPRETED and dtype == torch.bfloat16:
                room += TRUNCATED * F.linear(x.double().abs(), whole.abs()) + TRUNCATED
            for tile in tiles_for(rows, dtype).values():
                found = multiply(x, weight, added, tile)
                assert found.dtype == dtype and found.shape == (rows, N)
                assert bool(((found.double() - exact).abs() <= room).all())


@needs_kernels
@KINDS
def test_a_row_does_not_depend_on_its_neighbours(kind: str) -> None:
    weight, x = quantize(numbers(67, 131), kind), numbers(33, 131, seed=2).bfloat16()
    tile = Tile(rows=16, outputs=16, inputs=256)
    among = multiply(x, weight, None, tile)
    spoilt = torch.full_like(x, float("nan"))
    spoilt[20] = x[20]
    assert torch.equal(multiply(spoilt, weight, None, tile)[20], among[20])
    assert torch.equal(multiply(x[20:21], weight, None, tile)[0], among[20])


def test_a_polynomial_rounds_to_the_values_of_iq4_nl() -> None:
    for place, value in enumerate(CODES):
        at = sum(factor * (place - 8) ** power for power, factor in enumerate(IQ4_NL))
        assert abs(at - value) < 0.45
