"""A block's work in bf16 on a CPU by `gptray.native`: linear layers, MLP, attention, layer norm.

For processors with AVX-512's bf16 dot product. Weights and their gradients are fp32. The same bits
at any number of threads. Attention keeps no probabilities: the backward pass recomputes them (Dao
et al. 2022, FlashAttention).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptray.model.autograd_context import NormContext, OperatorContext
from gptray.native.abi import NORM_PARTS, PANEL, load_library
from gptray.native.backend import TRAIN_KEY

LARGEST_HEAD = PANEL


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b; x (..., K) bf16, W (N, K) and b (N) fp32, N and K even. Returns (..., N) bf16."""
    return _LINEAR([x, weight, bias])


def mlp(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    """gelu(x W^T + b) V^T + c with GPT-2's GELU; weights and biases as `linear`'s.

    Keeps GELU's slope in place of its argument, so the backward pass computes no GELU.
    """
    return _MLP([x, weight, bias, out_weight, out_bias])


def attention(qkv: Tensor, n_head: int) -> Tensor:
    """softmax(q k^T / sqrt(D) + causal mask) v of qkv (B, T, 3C) bf16, D = C / n_head even and at
    most LARGEST_HEAD. Returns (B, T, C)."""
    return _ATTENTION([qkv], n_head)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of x (..., C) bf16, weight and bias fp32; in eager mode, for inductor makes its
    own."""
    y: Tensor = _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return y


class _Operator:
    """A function of tensors and a number, with its gradient.

    forward: gives the result and what else the backward pass needs. backward: takes the result's
    gradient, the inputs and that (with keeps_result the result before it), and gives the inputs'
    gradients. In eager mode they are called as they are; torch.compile gets operators that it calls
    and does not look into, and learns from `shapes` what forward gives.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[list[Tensor], int], list[Tensor]],
        backward: Callable[[Tensor, list[Tensor], list[Tensor], int], list[Tensor]],
        shapes: Callable[[list[Tensor], int], list[Tensor]],
        *,
        keeps_result: bool = False,
    ) -> None:
        first_kept = 0 if keeps_result else 1

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: OperatorContext, number: int, *inputs: Tensor) -> Tensor:
                outputs = forward(list(inputs), number)
                ctx.number, ctx.count = number, len(inputs)
                ctx.save_for_backward(*inputs, *outputs[first_kept:])
                return outputs[0]

            @staticmethod
            def backward(ctx: OperatorContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
                saved = list(ctx.saved_tensors)
                inputs, kept = saved[: ctx.count], saved[ctx.count :]
                return None, *backward(grads[0], inputs, kept, ctx.number)

        @torch.library.custom_op(f"gptray::{name}", mutates_args=())
        def compiled(inputs: list[Tensor], number: int) -> list[Tensor]:
            return forward(inputs, number)

        @torch.library.custom_op(f"gptray::{name}_backward", mutates_args=())
        def compiled_backward(
            grad: Tensor, inputs: list[Tensor], kept: list[Tensor], number: int
        ) -> list[Tensor]:
            return backward(grad, inputs, kept, number)

        def keep(
            ctx: OperatorContext, inputs: tuple[list[Tensor], int], output: list[Tensor]
        ) -> None:
            ctx.number, ctx.count = inputs[1], len(inputs[0])
            ctx.save_for_backward(*inputs[0], *output[first_kept:])

        def differentiate(ctx: OperatorContext, grads: list[Tensor]) -> tuple[list[Tensor], None]:
            saved = list(ctx.saved_tensors)
            inputs, kept = saved[: ctx.count], saved[ctx.count :]
            return compiled_backward(grads[0], inputs, kept, ctx.number), None

        compiled.register_fake(shapes)
        compiled_backward.register_fake(
            lambda grad, inputs, kept, number: [x.new_empty(x.shape) for x in inputs]
        )
        compiled.register_autograd(differentiate, setup_context=keep)
        self._eager, self._compiled = Eager, compiled

    def __call__(self, inputs: Sequence[Tensor], number: int = 0) -> Tensor:
        if torch.compiler.is_compiling():
            result: Tensor = self._compiled(list(inputs), number)[0]
            return result
        y: Tensor = self._eager.apply(number, *inputs)  # type: ignore[no-untyped-call]
        return y


def _call(name: str, *arguments: Tensor | float) -> None:
    """Call a function of the library with its tensors and sizes, see `gptray.native.abi`."""
    getattr(load_library(key=TRAIN_KEY), name)(*arguments, torch.get_num_threads())


def _panels(columns: int, words: int) -> Tensor:
    """Room for packed numbers; PyTorch aligns it to 64 bytes."""
    return torch.empty(-(-columns // PANEL) * PANEL * words, dtype=torch.int32)


def _whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


# --- linear layers


def _linear(inputs: list[Tensor], _: int) -> list[Tensor]:
    return _products("linear", _whole(inputs), results=1)


def _linear_backward(
    grad: Tensor, inputs: list[Tensor], kept: list[Tensor], _: int
) -> list[Tensor]:
    grad, x, weight = _whole([grad, *inputs[:2]])
    return [_input_gradient(grad, weight), *_weight_gradients(grad, x, weight)]


def _linear_shapes(inputs: list[Tensor], _: int) -> list[Tensor]:
    x, weight = inputs[:2]
    return [x.new_empty(*x.shape[:-1], weight.size(0))]


def _mlp(inputs: list[Tensor], _: int) -> list[Tensor]:
    """The output, and for the backward pass GELU (..., N) and its slope."""
    x, weight, bias, *out = _whole(inputs)
    inner, slope = _products("linear_gelu", [x, weight, bias], results=2)
    return [*_products("linear", [inner, *out], results=1), inner, slope]


def _mlp_backward(grad: Tensor, inputs: list[Tensor], kept: list[Tensor], _: int) -> list[Tensor]:
    grad, x, weight, out_weight = _whole([grad, *inputs[:2], inputs[3]])
    inner, slope = kept
    grads_out = _weight_gradients(grad, inner, out_weight)
    grad = _input_gradient(grad, out_weight, slope)
    return [_input_gradient(grad, weight), *_weight_gradients(grad, x, weight), *grads_out]


def _mlp_shapes(inputs: list[Tensor], _: int) -> list[Tensor]:
    x, (inner,) = inputs[0], _linear_shapes(inputs, 0)
    return [torch.empty_like(x), inner, torch.empty_like(inner)]


def _products(name: str, inputs: list[Tensor], *, results: int) -> list[Tensor]:
    """What a function makes of x (..., K), W (N, K) and b: tensors of (..., N)."""
    x, weight, bias = inputs
    M, N, K = _sizes(x, weight)
    made = [x.new_empty(*x.shape[:-1], N) for _ in range(results)]
    _call(name, x, weight, bias, *made, _panels(N, K // 2), M, N, K)
    return made


def _input_gradient(grad: Tensor, weight: Tensor, slope: Tensor | None = None) -> Tensor:
    """grad W, times a slope."""
    N, K = weight.shape
    grad_x = grad.new_empty(*grad.shape[:-1], K)
    slopes = [] if slope is None else [slope]
    name = "input_gradient" if slope is None else "input_gradient_gelu"
    _call(name, grad, weight, *slopes, grad_x, _panels(K, N // 2), *_sizes(grad_x, weight))
    return grad_x


def _weight_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Those of a linear layer's weight and bias."""
    M, N, K = _sizes(x, weight)
    grads = [torch.empty_like(weight), weight.new_empty(N)]
    _call("weight_gradients", grad, x, *grads, _panels(min(N, K), (M + 1) // 2), M, N, K)
    return grads


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """M, N and K of x (..., K), M rows, and W (N, K)."""
    N, K = weight.shape
    return x.numel() // K, N, K


_LINEAR = _Operator("linear", _linear, _linear_backward, _linear_shapes)
_MLP = _Operator("mlp", _mlp, _mlp_backward, _mlp_shapes)


# --- attention


def _attend(inputs: list[Tensor], n_head: int) -> list[Tensor]:
    """The output (B, T, C), and of each query the logarithm of its sum of exponentials."""
    (qkv,) = _whole(inputs)
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    out, log_sums = qkv.new_empty(B, T, C), torch.empty(B, n_head, T)
    _call("attention", qkv, out, log_sums, B, T, n_head, C // n_head)
    return [out, log_sums]


def _attend_backward(
    grad: Tensor, inputs: list[Tensor], kept: list[Tensor], n_head: int
) -> list[Tensor]:
    grad, qkv = _whole([grad, *inputs])
    B, T, C = grad.shape
    grad_qkv = torch.empty_like(qkv)
    _call("attention_gradient", grad, qkv, *kept, grad_qkv, B, T, n_head, C // n_head)
    return [grad_qkv]


def _attention_shapes(inputs: list[Tensor], n_head: int) -> list[Tensor]:
    (qkv,) = inputs
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    return [qkv.new_empty(B, T, C), qkv.new_empty((B, n_head, T), dtype=torch.float32)]


_ATTENTION = _Operator("attention", _attend, _attend_backward, _attention_shapes, keeps_result=True)


# --- layer norm


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: NormContext, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x, weight, bias = _whole([x, weight, bias])
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        y, C = torch.empty_like(x), x.size(-1)
        _call("layer_norm", x, weight, bias, y, eps, x.numel() // C, C)
        return y

    @staticmethod
    def backward(ctx: NormContext, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad, C = grads[0].contiguous(), x.size(-1)
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        grad_bias, sums = torch.empty_like(weight), weight.new_empty(NORM_PARTS, 2, C)
        tensors = [grad, x, weight, grad_x, grad_weight, grad_bias, sums]
        _call("layer_norm_gradients", *tensors, ctx.eps, x.numel() // C, C)
        return grad_x, grad_weight, grad_bias, None
