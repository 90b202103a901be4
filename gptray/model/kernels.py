"""Training in bf16 on a CPU with `gptray.native`: linear layers, MLP, attention, norms, and the
head with its loss.

For x86 processors with AVX-512's bf16 dot product, and for ARM. Weights and their gradients are
fp32. The bits are the same at any number of threads. Attention saves no probabilities: the backward
pass recomputes them (Dao et al. 2022, FlashAttention), and also the normalised and rotated queries
and keys.

Shapes: M rows, H query heads, G key and value heads, D numbers in a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptray.model.autograd_context import NormContext
from gptray.model.kernel_calls import (
    call,
    contiguous,
    gated_columns,
    input_gradient,
    panels,
    product,
    sizes,
    weight_gradients,
)
from gptray.model.operator import Given, Operator
from gptray.model.rotary import Angles
from gptray.native.abi import NORM_PARTS

# The library's functions for an MLP's first layer with its activation, and for their gradient.
_MLPS = {
    "gelu_new": ("linear_gelu", "input_gradient_sloped"),
    "gelu": ("linear_exact_gelu", "input_gradient_sloped"),
    "relu": ("linear_relu", "input_gradient_sloped"),
    "swiglu": ("linear_swiglu", "input_gradient_gates"),
    "geglu": ("linear_geglu", "input_gradient_gates"),
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b; x (..., K) bf16, W (N, K) and b (N) fp32, N and K even. Returns (..., N) bf16."""
    return _LINEAR([x, *_layer(weight, bias)])


def mlp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    kind: str,
) -> Tensor:
    """a(x W^T + b) V^T + c, where a is `gptray.model.layers.activation` of a kind; weights and
    biases as in `linear`, both biases or none.

    Saves the activation's slopes instead of its argument, so the backward pass computes none.
    """
    layers = [*_layer(weight, bias), *_layer(out_weight, out_bias)]
    return _MLP([x, *layers], numbers=[list(_MLPS).index(kind)])


def attention(
    qkv: Tensor,
    n_head: int,
    kv_heads: int,
    *,
    angles: Angles | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + causal mask) v with n_head heads of q and kv_heads of k and v.

    qkv (B, T, (H + 2 G) D) bf16, D even. norms: weights (D) in fp32 of the RMSNorms, with eps, of
    queries and of keys. angles: of the rotation after that, bf16. Returns (B, T, H D).
    """
    return _ATTENTION([qkv, *(norms or ())], angles or (), [n_head, kv_heads, eps])


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm of x (..., C) bf16, or RMSNorm without a bias; weight and bias fp32.

    Only for eager mode: inductor generates its own.
    """
    y: Tensor = _Norm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return y


def head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, *, valid: int, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-log softmax(x W^T)[target] of each row, (M) fp32, and the gradients of their sum with
    respect to x, bf16, and to W, fp32, or None if not needed.

    x (M, C) bf16, C even; W (V, C) fp32, or bf16 if frozen, of which the first `valid` rows are
    tokens; targets (M) int64. Autograd records nothing.
    """
    x, weight, targets = contiguous([x, weight, targets])
    losses, grad_x = torch.empty(len(x)), torch.empty_like(x)
    grad_weight = torch.empty_like(weight) if needs_weight else None
    made = losses, grad_x, grad_weight
    either = (None, weight) if weight.dtype == x.dtype else (weight, None)
    call("head_loss", x, *either, targets, *made, len(x), *weight.shape, valid)
    return made


def _or_none(tensors: Sequence[Tensor], count: int) -> list[Tensor | None]:
    """The tensors, then None for each missing one."""
    return [*tensors, *[None] * (count - len(tensors))]


# --- linear layers: a weight, and a bias or none


def _layer(weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    return [weight] if bias is None else [weight, bias]


def _linear(given: Given) -> list[Tensor]:
    x, *layer = contiguous(given.tensors)
    return [product(x, *layer)]


def _linear_backward(grad: Tensor, given: Given, kept: list[Tensor]) -> list[Tensor]:
    grad, x, *layer = contiguous([grad, *given.tensors])
    return [input_gradient(grad, layer[0]), *weight_gradients(grad, x, has_bias=len(layer) == 2)]


def _linear_shapes(given: Given) -> list[Tensor]:
    x, weight = given.tensors[:2]
    return [x.new_empty(*x.shape[:-1], weight.size(0))]


def _mlp(given: Given) -> list[Tensor]:
    """The output, and for the backward pass the activation's values (..., N) and slopes, as wide as
    its argument."""
    x, *layers = contiguous(given.tensors)
    (weight, *bias), out = _mlp_layers(layers)
    (M, rows, K), N = sizes(x, weight), out[0].size(1)
    inner, slopes = (x.new_empty(*x.shape[:-1], width) for width in (N, rows))
    scratch = panels(N if rows == N else gated_columns(N), K // 2)
    made = inner, slopes, scratch
    call(_functions(given.numbers)[0], x, weight, *_or_none(bias, 1), *made, M, N, K)
    return [product(inner, *out), inner, slopes]


def _mlp_backward(grad: Tensor, given: Given, kept: list[Tensor]) -> list[Tensor]:
    grad, x, *layers = contiguous([grad, *given.tensors])
    layer, out = _mlp_layers(layers)
    inner, slopes = kept
    grads_out = weight_gradients(grad, inner, has_bias=len(out) == 2)
    (N, K), grad_inner = out[0].shape, torch.empty_like(slopes)
    tensors = grad, out[0], slopes, grad_inner, panels(K, N // 2)
    call(_functions(given.numbers)[1], *tensors, *sizes(inner, out[0]))
    grads = weight_gradients(grad_inner, x, has_bias=len(layer) == 2)
    return [input_gradient(grad_inner, layer[0]), *grads, *grads_out]


def _mlp_shapes(given: Given) -> list[Tensor]:
    x, *layers = given.tensors
    layer, out = _mlp_layers(layers)
    widths = out[0].size(1), layer[0].size(0)
    return [torch.empty_like(x), *(x.new_empty(*x.shape[:-1], width) for width in widths)]


def _mlp_layers(layers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """An MLP's first layer and its second."""
    half = len(layers) // 2
    return layers[:half], layers[half:]


def _functions(numbers: list[float]) -> tuple[str, str]:
    return list(_MLPS.values())[int(numbers[0])]


_LINEAR = Operator("linear", _linear, _linear_backward, _linear_shapes)
_MLP = Operator("mlp", _mlp, _mlp_backward, _mlp_shapes)


# --- attention


def _attend(given: Given) -> list[Tensor]:
    """The output (B, T, H D), and each query's log2 of the sum of exponentials."""
    out, log_sums = _attention_shapes(given)
    call("attention", *_preparation(given), out, log_sums, given.numbers[2], *_head_sizes(given))
    return [out, log_sums]


def _attend_backward(grad: Tensor, given: Given, kept: list[Tensor]) -> list[Tensor]:
    qkv, sizes = given.tensors[0], _head_sizes(given)
    B, _, _, G, D, _ = sizes
    weights, sums = torch.empty(2, D), torch.empty(B, G, 2, D)
    made = [qkv.new_empty(qkv.shape), weights, sums]
    tensors = [grad.contiguous(), *_preparation(given), *kept, *made]
    call("attention_gradient", *tensors, given.numbers[2], *sizes)
    # Cloned, because an operator's results must not share memory.
    return [made[0], *(part.clone() for part in weights[: len(given.tensors) - 1])]


def _attention_shapes(given: Given) -> list[Tensor]:
    qkv = given.tensors[0]
    B, T, H, _, D, _ = _head_sizes(given)
    return [qkv.new_empty(B, T, H * D), qkv.new_empty((B, H, T), dtype=torch.float32)]


def _preparation(given: Given) -> list[Tensor | None]:
    """qkv, the norms' weights and the angles; None for those that are missing."""
    qkv, *norms = contiguous(given.tensors)
    return [qkv, *_or_none(norms, 2), *_or_none(contiguous(given.constants), 2)]


def _head_sizes(given: Given) -> tuple[int, int, int, int, int, int]:
    """B, T, H, G, D and the number of rotated pairs."""
    qkv, H, G = given.tensors[0], int(given.numbers[0]), int(given.numbers[1])
    half = given.constants[0].size(1) if given.constants else 0
    return qkv.size(0), qkv.size(1), H, G, qkv.size(2) // (H + 2 * G), half


_ATTENTION = Operator("attention", _attend, _attend_backward, _attention_shapes, keeps_result=True)


# --- norms


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: NormContext, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor:
        x, weight = contiguous([x, weight])
        ctx.eps, ctx.has_bias = eps, bias is not None
        ctx.save_for_backward(x, weight)
        y, C = torch.empty_like(x), x.size(-1)
        call("layer_norm", x, weight, bias, y, eps, x.numel() // C, C)
        return y

    @staticmethod
    def backward(ctx: NormContext, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad, C = grads[0].contiguous(), x.size(-1)
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        grad_bias = torch.empty_like(weight) if ctx.has_bias else None
        sums = weight.new_empty(NORM_PARTS, 2, C)
        tensors = [grad, x, weight, grad_x, grad_weight, grad_bias, sums]
        call("layer_norm_gradients", *tensors, ctx.eps, x.numel() // C, C)
        return grad_x, grad_weight, grad_bias, None
