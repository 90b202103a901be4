"""The decoder's layers, each in the fastest form for where it runs.

bf16 on a CPU that supports it: `gptray.model.kernels`. Other eager bf16: casts inside the linear
layer's own backward pass. Under torch.compile on a CPU: plain fp32 formulas between the GEMMs,
which inductor fuses; on a GPU, the GEMM adds the bias. Dropout on a CPU: from whole random words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptray.config import ModelConfig
from gptray.model import frozen_kernels, kernels
from gptray.model.autograd_context import Context, LinearContext, NormContext
from gptray.model.frozen_layer import FrozenLayer
from gptray.model.precision import has_onednn_linear


class Linear(nn.Linear):
    """A linear layer that computes in its input's dtype; `GPT.initialise` sets its weights.

    native: use `gptray.model.kernels`, for bf16 on a CPU, or if the weight is frozen in bf16,
    `gptray.model.frozen_kernels`.
    """

    native = False

    def frozen_layer(self, rows: torch.Size) -> FrozenLayer:
        """The layer's data for the kernels of frozen layers, for x (*rows, inputs)."""
        return FrozenLayer(self.weight, None, self.bias)

    def reset_parameters(self) -> None:
        """Draw nothing: `GPT.initialise` does."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            if self.native:
                return frozen_kernels.linear(x, self.frozen_layer(x.shape[:-1]))
            return F.linear(x, self.weight, self.bias)
        if self.native:
            return kernels.linear(x, self.weight, self.bias)
        y: Tensor = _CastLinear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return y


class _CastLinear(torch.autograd.Function):
    """x W^T + b with fp32 W and b cast to x's dtype, and their gradients back."""

    @staticmethod
    def forward(ctx: LinearContext, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Not the cast copy, or one per layer would be kept until the backward pass.
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        on_cpu = x.device.type == "cpu"
        if on_cpu and torch.compiler.is_compiling():
            # Added in fp32, the bias fuses into the next pointwise kernel, not into a slower addmm.
            y: Tensor = F.linear(x, weight)
            return y if bias is None else (y.float() + bias).to(x.dtype)
        # oneDNN adds the bias in the GEMM, addmm before it.
        if on_cpu and has_onednn_linear(torch.bfloat16):
            y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            return y
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: LinearContext, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        grad_weight = torch.mm(grad.t(), x.flatten(0, -2)).float()
        grad_x = torch.mm(grad, weight.to(x.dtype)).view(x.shape)
        if not ctx.has_bias:
            return grad_x, grad_weight, None
        if x.device.type != "cpu":
            grad_bias = grad.sum(0, dtype=torch.float32)
        elif torch.compiler.is_compiling():
            # Not a sum over rows, which inductor would fuse badly with the kernel that made grad.
            grad_bias = torch.mm(grad.new_ones(1, grad.size(0)), grad)[0]
        else:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias.float()


class LayerNorm(nn.LayerNorm):
    """Layer norm in its input's dtype (statistics in fp32)."""

    native = False

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if self.native and not torch.compiler.is_compiling():
            return kernels.norm(x, weight, bias, self.eps)
        if x.device.type == "cpu" and x.dtype != weight.dtype and not torch.compiler.is_compiling():
            y: Tensor = _CastLayerNorm.apply(x, weight, bias, self.eps)  # type: ignore[no-untyped-call]
            return y
        return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), self.eps)


class _CastLayerNorm(torch.autograd.Function):
    """Layer norm of bf16 rows on a CPU with fp32 weights and accurate gradients for them.

    PyTorch's kernel sums those gradients over all rows in bf16: 7% off after 4,096 rows.
    """

    @staticmethod
    def forward(ctx: NormContext, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: NormContext, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        grad, shape = grads[0], x.shape[-1:]
        grad_x: Tensor = torch.ops.aten.native_layer_norm_backward(
            grad, x, shape, mean, rstd, weight, bias, [True, False, False]
        )[0]
        normed = torch.native_layer_norm(x, shape, None, None, ctx.eps)[0]
        # The sum of a single tensor accumulates in fp32.
        grad_weight = normed.mul_(grad).flatten(0, -2).sum(0).float()
        return grad_x, grad_weight, grad.flatten(0, -2).sum(0).float(), None


class RMSNorm(nn.Module):
    """x over its root mean square, times a weight; in its input's dtype (mean in fp32).

    Zhang & Sennrich 2019. `GPT.initialise` sets the weight, to which Gemma adds an `offset` of 1.
    """

    native = False

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.offset = config.layer_norm_epsilon, 1.0 if config.centred_norm else 0.0

    @property
    def scale(self) -> Tensor:
        """The weight plus the offset."""
        if not self.offset:
            return self.weight
        wide = torch.promote_types(self.weight.dtype, torch.float32)  # in bf16 it would be rounded
        return self.weight.to(wide) + self.offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.scale
        if torch.compiler.is_compiling():
            return rms_norm(x, weight, self.eps)
        if self.native:
            return kernels.norm(x, weight, None, self.eps)
        y: Tensor = _RMSNorm.apply(x, weight, self.eps)  # type: ignore[no-untyped-call]
        return y


def norm_of(config: ModelConfig) -> nn.Module:
    """A norm of the residual stream."""
    if config.norm == "none":
        return nn.Identity()
    if config.norm == "rmsnorm":
        return RMSNorm(config, config.n_embd)
    return LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x by plain formulas; the mean is in fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return normed.to(x.dtype) * weight.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Saves only x and the weight, and sums the weight's gradient in fp32."""

    @staticmethod
    def forward(ctx: NormContext, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: NormContext, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad, wide = grads[0].float(), x.float()
        inverse = (wide.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        normed = wide * inverse
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight.float()
        grad_x = inverse * (grad - normed * (grad * normed).mean(-1, keepdim=True))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def activation(x: Tensor, kind: str) -> Tensor:
    """An MLP's activation: gelu_new, gelu or relu; or for x (..., 2 N), which holds gate and input
    side by side, silu(gate) * input (swiglu) or gelu_new(gate) * input (geglu), (..., N) (Shazeer
    2020)."""
    if kind == "gelu_new":
        return gelu(x)
    if kind == "gelu":
        return F.gelu(x)
    if kind == "relu":
        return F.relu(x)
    gate, inner = x.chunk(2, dim=-1)
    return (gelu(gate) if kind == "geglu" else F.silu(gate)) * inner


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016)."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        y: Tensor = _RationalGelu.apply(x)  # type: ignore[no-untyped-call]
        return y
    return F.gelu(x, approximate="tanh")


class _RationalGelu(torch.autograd.Function):
    """GELU by a rational tanh: inductor's tanh and exp would take most of a fused kernel's time."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        z = x.float()
        return (0.5 * z * (1.0 + _tanh(z * (GELU_1 + GELU_3 * z * z)))).to(x.dtype)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        z = x.float()
        t = _tanh(z * (GELU_1 + GELU_3 * z * z))
        slope: Tensor = 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * (GELU_1 + 3.0 * GELU_3 * z * z)
        return (grads[0].float() * slope).to(x.dtype)


# sqrt(2 / pi) and 0.044715 sqrt(2 / pi)
GELU_1, GELU_3 = 0.7978845608028654, 0.035677408136300125
# tanh(u) = u P(u^2) / Q(u^2) to 5e-7 on [-TANH_LIMIT, TANH_LIMIT], beyond which it is 1 in fp32:
# the coefficients of Eigen's ptanh, highest power first.
TANH_LIMIT = 7.90531110763549805
TANH_P = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def _tanh(u: Tensor) -> Tensor:
    u = u.clamp(-TANH_LIMIT, TANH_LIMIT)
    square = u * u
    p, q = torch.full_like(u, TANH_P[0]), torch.full_like(u, TANH_Q[0])
    for coefficient in TANH_P[1:]:
        p = p * square + coefficient
    for coefficient in TANH_Q[1:]:
        q = q * square + coefficient
    return u * p / q


def dropout(x: Tensor, p: float) -> Tensor:
    """x with each element zeroed with probability p, the others divided by 1 - p."""
    if not p:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return x * dropout_mask(x, p)


def drawn_mask(shape: Sequence[int], p: float, dtype: torch.dtype) -> Tensor:
    """A mask for x of this shape on a CPU, by which `dropout` would multiply it."""
    if torch.compiler.is_compiling():
        return F.dropout(torch.ones(shape, dtype=dtype), p)
    return dropout_mask(torch.empty(shape, dtype=dtype), p)


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in x's shape and dtype; on CPU, in eager mode.

    Uses 16 random bits per element: on a CPU, PyTorch draws dropout one double at a time on one
    thread, which takes longer than the GEMMs around it. p is met to within 1/131072.
    """
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    dropped = round(p * 2**16)
    keep = bits >= dropped - 2**15
    return keep.to(x.dtype).mul_(2**16 / (2**16 - dropped))
