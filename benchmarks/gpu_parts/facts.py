"""The GPU's own limits, to compare all other figures with."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from gpu_parts.bench import Bench
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def facts(bench: Bench) -> None:
    gemm, copy = gemm_rate(bench), copy_rate(bench)
    bench.keep("facts: bf16 GEMM, TFLOP/s", round(gemm / 1e12, 1))
    bench.keep("facts: copy, TB/s read + written", round(copy / 1e12, 3))
    bench.say(f"bf16 GEMM {gemm / 1e12:.0f} TFLOP/s, copy {copy / 1e12:.2f} TB/s (read + written)")
    for name, kernel in KERNELS.items():
        for deterministic in (False, True):
            attention(bench, name, kernel, deterministic=deterministic)


def gemm_rate(bench: Bench) -> float:
    """FLOP/s of a large bf16 matrix product of random numbers."""
    size = 256 if bench.tiny else 8192
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / bench.seconds(lambda: a @ b)


def copy_rate(bench: Bench) -> float:
    """Bytes per second, read plus written, of a large copy in the GPU's memory."""
    source = torch.empty(1 << (20 if bench.tiny else 30), device=bench.device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / bench.seconds(lambda: target.copy_(source))


def attention(bench: Bench, name: str, kernel: SDPBackend, *, deterministic: bool) -> None:
    """Time an attention kernel, forward and backward, for GPT-2 124M's shape and 12 sequences."""
    title = f"facts: attention by {name}{', deterministic' if deterministic else ''}"
    torch.use_deterministic_algorithms(deterministic)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns why it did not choose other kernels
            ms = bench.seconds(attention_step(bench, kernel)) * 1e3
    except RuntimeError:  # not available on this GPU, in this build or with determinism
        bench.keep(title, None)
        bench.say(f"{title}: not available")
    else:
        bench.keep(title, {"ms": round(ms, 3)})
        bench.say(f"{title}: {ms:.3f} ms forward and backward")
    finally:
        torch.use_deterministic_algorithms(False)


def attention_step(bench: Bench, kernel: SDPBackend) -> Callable[[], None]:
    rows, block, heads, width = (2, 64, 2, 16) if bench.tiny else (12, 1024, 12, 64)
    shape = (rows, block, 3, heads, width)
    qkv = torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(rows, heads, block, width, device=bench.device, dtype=torch.bfloat16)

    def step() -> None:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(kernel):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.backward(y, grad)

    return step
