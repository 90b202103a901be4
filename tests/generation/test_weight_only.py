"""Triton's kernels for quantized weights: by Triton's interpreter on a CPU, or on a GPU.

TRITON_INTERPRET=1 python -m pytest tests/generation/test_weight_only.py
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from gptray.generation.weight_only import GpuWeight, is_right, multiply, tiles_for, unpacking
from gptray.model.packed_weights import PACKINGS
from gptray.model.quantized import CODES, IN_GROUPS, IQ4_NL, quantize

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
KINDS = pytest.mark.parametrize("kind", PACKINGS)
needs_kernels = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(),
    reason="needs a GPU, or Triton and TRITON_INTERPRET=1",
)
# What the interpreter loses of a number in bf16, which it rounds towards zero.
TRUNCATED = torch.finfo(torch.bfloat16).eps
# Outputs and inputs: whole blocks, and numbers that are multiples of nothing.
SHAPES = [(64, 256), (3, 32), (67, 131), (131, 289)]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE)


@pytest.mark.gpu
@needs_kernels
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_become_whole_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    for N, K in SHAPES:
        weight = quantize(numbers(N, K), kind)
        found, whole = GpuWeight.of(weight).dequantize(dtype), weight.dequantize(dtype)
        if IS_INTERPRETED and dtype == torch.bfloat16:
            torch.testing.assert_close(found, whole, rtol=TRUNCATED, atol=0)
        else:
            assert torch.equal(found, whole)


@pytest.mark.gpu
@needs_kernels
@KINDS
@pytest.mark.parametrize(
    ("dtype", "rows"),
    [(torch.bfloat16, 1), (torch.bfloat16, 20), (torch.bfloat16, 70), (torch.float16, 20)],
)
def test_products_are_those_with_exact_weights(kind: str, dtype: torch.dtype, rows: int) -> None:
    for N, K in (SHAPES[0], SHAPES[-1]):
        weight, bias = quantize(numbers(N, K), kind), numbers(N, seed=1).to(dtype)
        x, exact = numbers(rows, K, seed=2).to(dtype), weight.dequantize().double()
        expected = F.linear(x.double(), exact, bias.double())
        # The sum's own error, and half a unit in the last place of what it is rounded to.
        room = 1e-5 * expected.abs().max() + expected.abs() * torch.finfo(dtype).eps / 2
        if IS_INTERPRETED and dtype == torch.bfloat16:
            room += TRUNCATED * F.linear(x.double().abs(), exact.abs()) + TRUNCATED
        for tile in tiles_for(rows, dtype).values():
            found = multiply(x, GpuWeight.of(weight), bias, tile)
            assert found.dtype == dtype and found.shape == (rows, N)
            assert bool(((found.double() - expected).abs() <= room).all())


@pytest.mark.gpu
@needs_kernels
@KINDS
@pytest.mark.parametrize("name", ["shared", "sliced"])
def test_a_row_does_not_depend_on_its_neighbours(kind: str, name: str) -> None:
    weight, x = quantize(numbers(67, 131), kind), numbers(33, 131, seed=2).bfloat16()
    packed, tile = GpuWeight.of(weight), tiles_for(1, x.dtype)[name]
    among = multiply(x, packed, None, tile)
    spoilt = torch.full_like(x, float("nan"))
    spoilt[20] = x[20]
    assert torch.equal(multiply(spoilt, packed, None, tile)[20], among[20])
    assert torch.equal(multiply(x[20:21], packed, None, tile)[0], among[20])


def test_a_kernel_that_fails_or_errs_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    expected = torch.tensor([1.0, -2.0])

    def fails() -> torch.Tensor:
        raise ValueError("no such\ninstruction")

    def exhausted() -> torch.Tensor:
        raise MemoryError

    assert is_right("int4", lambda: expected + 0.25, expected, 0.25)
    for _ in range(2):
        assert not is_right("int4", lambda: expected + 0.5, expected, 0.25)
        assert not is_right("int4", lambda: expected * float("nan"), expected, 0.25)
        assert not is_right("int4", fails, expected)
    assert [one.getMessage().partition(": ")[2] for one in caplog.records] == [
        "its results differ from PyTorch's for int4",
        "ValueError: no such",
    ]
    with pytest.raises(MemoryError):
        is_right("int4", exhausted, expected)


def ptx_values(text: str, held: int, dtype: torch.dtype) -> torch.Tensor:
    """What PTX from `unpacking` gives for a word of codes: (4 words, 2 values)."""
    words = {"$4": held}

    def word(name: str) -> int:
        return words[name] if name in words else int(name, 0) & 0xFFFFFFFF

    def halves(number: int) -> torch.Tensor:
        return torch.tensor([number], dtype=torch.int64).view(dtype)[:2]

    for line in text.strip("{} ").removesuffix(";").split(";"):
        operation, *names = line.replace(",", " ").split()
        if operation == ".reg":
            continue
        target, (a, *rest) = names[0], [word(name) for name in names[1:]]
        match operation.split(".")[0]:
            case "mov":
                made = a
            case "and":
                made = a & rest[0]
            case "shr":
                made = a >> rest[0]
            case "lop3":
                assert rest[2] == 0xEA  # (a & b) | c
                made = a & rest[0] | rest[1]
            case "prmt":
                both = a | rest[0] << 32
                places = [rest[1] >> 4 * i & 15 for i in range(4)]
                assert max(places) < 8
                made = sum((both >> 8 * place & 255) << 8 * i for i, place in enumerate(places))
            case "fma":
                sums = halves(a) * halves(rest[0]) + halves(rest[1])
                made = int(sums.view(torch.int32)) & 0xFFFFFFFF
        words[target] = made
    return torch.stack([halves(words[f"${place}"]) for place in range(4)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", IN_GROUPS)
def test_ptx_makes_values_of_codes(kind: str, dtype: torch.dtype) -> None:
    values = torch.tensor(CODES if kind == "iq4_nl" else range(-8, 8), dtype=dtype)
    text, codes = unpacking(kind, dtype), torch.arange(256)
    for first in range(0, 256, 4):
        held = sum(number << 8 * place for place, number in enumerate(range(first, first + 4)))
        low, high = ptx_values(text, held, dtype).view(2, 4)
        assert torch.equal(low, values[codes[first : first + 4] & 15])
        assert torch.equal(high, values[codes[first : first + 4] >> 4])


def test_a_polynomial_rounds_to_the_values_of_iq4_nl() -> None:
    for place, value in enumerate(CODES):
        at = sum(factor * (place - 8) ** power for power, factor in enumerate(IQ4_NL))
        assert abs(at - value) < 0.45
