"""What is chosen to compute in, and the gate on fast fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gptray.model.precision import enable_fast_fp32, pick_dtype


@pytest.fixture(autouse=True)
def _matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_precision_is_as_told() -> None:
    assert pick_dtype("fp32", "cpu") == torch.float32
    assert pick_dtype("bf16", "cpu") == torch.bfloat16
    assert pick_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)
    assert pick_dtype("auto", "meta") == torch.float32


def test_fast_fp32_keeps_fp32_grade_products() -> None:
    enable_fast_fp32()
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(300, 700, generator=generator)
    b = torch.randn(700, 200, generator=generator)
    exact = a.double() @ b.double()
    assert ((a @ b).double() - exact).norm() / exact.norm() < 1e-5
