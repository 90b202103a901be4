"""The decoder's layers, each in the form that is fastest where it runs.

Eager bf16 on a CPU: casts folded into the linear layer's own backward, dropout from whole random
words. Under torch.compile: plain formulas in fp32 between the GEMMs, which inductor fuses.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """A linear layer that computes in its input's dtype; `GPT.initialise` sets its weights."""

    def reset_parameters(self) -> None:
        """Draw nothing."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return F.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling():
            # The bias in fp32: so it joins the next pointwise kernel, and not a slower addmm.
            return (F.linear(x, self.weight.to(x.dtype)).float() + self.bias).to(x.dtype)
        y: Tensor = _CastLinear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return y


class _CastLinear(torch.autograd.Function):
    """x W^T + b with fp32 W and b cast to x's dtype, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        ctx.save_for_backward(x, weight)
        if x.device.type == "cpu" and _fuses_bias():
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            return y
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        grad_weight = torch.mm(grad.t(), x.flatten(0, -2)).float()
        return torch.mm(grad, weight).view(x.shape), grad_weight, grad.sum(0).float()


@cache
def _fuses_bias() -> bool:
    """Whether oneDNN's linear layer is there: it adds the bias in the GEMM, addmm before it."""
    return bool(
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class LayerNorm(nn.LayerNorm):
    """Layer norm in its input's dtype (statistics in fp32)."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if x.is_cuda:  # on CPU the kernel reads fp32 weights beside bf16 activations
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016)."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        # (1 + tanh(u)) / 2 = sigmoid(2u), three times as fast in inductor's vector code.
        z = x.float()
        return (z * torch.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


def dropout(x: Tensor, p: float) -> Tensor:
    """x with each element zeroed with probability p, the others divided by 1 - p."""
    if not p:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return x * dropout_mask(x, p)


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in x's shape and dtype; on CPU, in eager mode.

    From 16 bits an element: PyTorch draws a CPU's dropout one double at a time on one thread,
    which takes longer than the GEMMs around it. p is met to within 1/131072.
    """
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    dropped = round(p * 2**16)
    keep = bits >= dropped - 2**15
    return keep.to(x.dtype).mul_(2**16 / (2**16 - dropped))
