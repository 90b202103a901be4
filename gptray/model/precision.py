"""Chooses the precision: bf16 if the hardware has it, and oneDNN's faster fp32 GEMM if it is exact.

The functions only inspect the machine; the training loop decides where to use the answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from gptray.config import UserError
from gptray.config.values import Precision
from gptray.native.backend import why_not_native


def pick_dtype(
    precision: Precision, device: torch.device | str, *, key: str = "train.precision"
) -> torch.dtype:
    """The dtype for a precision; auto is bf16 only if the hardware supports it.

    Raises UserError, naming `key`, for one that the GPU does not support.
    """
    device = torch.device(device)
    if precision == "fp32" or (precision == "auto" and not computes_bf16(device)):
        return torch.float32
    if device.type == "cuda" and not computes_bf16(device):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{key}=bf16: {name} does not support bf16; set {key}=fp32 (or auto)")
    return torch.bfloat16


def computes_bf16(device: torch.device) -> bool:
    """Whether a device has bf16 arithmetic, and on a CPU something here that uses it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not (has_onednn() or why_not_native(use_gpu=False) is None):
        return False
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def has_onednn() -> bool:
    """Whether PyTorch has oneDNN for CPUs, which its builds for macOS lack."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@cache
def has_onednn_linear(dtype: torch.dtype) -> bool:
    """Whether oneDNN's linear layer exists and computes in `dtype` on this processor."""
    if not has_onednn():
        return False
    computes = dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return computes and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def enable_fast_fp32() -> None:
    """Let oneDNN run fp32 GEMMs on a CPU if they keep fp32's precision.

    PyTorch's "medium" allows bf16 internally. Many processors do not use that and are merely
    faster; some (AMX) do, so a product is first compared with its float64 value. The setting is
    process-wide and would mean TF32 on a GPU, so it stays unchanged in a process that sees a GPU.
    """
    if torch.cuda.is_available():
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    if _gemm_error() >= 1e-5:
        torch.set_float32_matmul_precision(before)


@contextmanager
def own_fp32() -> Iterator[None]:
    """Compute fp32 products in the block with PyTorch's own GEMM.

    oneDNN's, which `enable_fast_fp32` may have enabled, sums in an order that depends on the number
    of rows, so a row's result would depend on its neighbours.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _gemm_error() -> float:
    """Relative error of fp32 products of two shapes; about 1e-6 in fp32, 1e-3 in bf16 or TF32."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for rows, inner, columns in ((512, 512, 512), (64, 1024, 256)):
        a = torch.randn(rows, inner, generator=generator)
        b = torch.randn(columns, inner, generator=generator)
        exact = a.double() @ b.double().t()
        product = torch.nn.functional.linear(a, b)
        errors.append(float((product.double() - exact).norm() / exact.norm()))
    return max(errors)
