"""Frozen linear layers and MLPs with adapters, in bf16 on a CPU by `gptray.native`.

Hu et al. 2022, LoRA: y = x W^T + b + scale (x A^T) B^T. The kernels fuse the products: a sum runs
through W and B, and for x's gradient through W and A. W, in bf16 or dequantized (Dettmers et al.
2023, QLoRA), is packed on each call and gets no gradient. The bits are the same at any number of
threads.

Shapes: M rows, K inputs, N outputs, R the ranks of a layer's adapters together, padded to even.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from gptray.model.frozen_layer import Adapters, FrozenLayer, dequantized
from gptray.model.kernel_calls import (
    call,
    contiguous,
    gated_columns,
    input_gradient,
    panels,
    product,
    weight_gradients,
)
from gptray.model.operator import Given, Operator
from gptray.native.abi import ACTIVATIONS, GEGLU, NONE, SWIGLU

_GATED = (SWIGLU, GEGLU)


def linear(x: Tensor, layer: FrozenLayer) -> Tensor:
    """A layer with its adapters, for x (..., K) in bf16; K and N even."""
    return _LINEAR([x, *layer.tensors], layer.constants, layer.numbers)


def mlp(x: Tensor, first: FrozenLayer, second: FrozenLayer, *, kind: str) -> Tensor:
    """Two layers with `gptray.model.layers.activation` of a kind between them."""
    tensors, constants = first.tensors + second.tensors, first.constants + second.constants
    numbers = [float(ACTIVATIONS[kind]), *first.numbers, *second.numbers]
    return _MLP([x, *tensors], constants, numbers)


# --- a layer's parts


def _forward(
    x: Tensor, layer: FrozenLayer, activation: int = NONE
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The output, the activation's slopes if there is one, and u = x A^T (..., R)."""
    weight, u, up = _weight(layer, x), x.new_empty(*x.shape[:-1], 0), None
    if layer.adapters:
        u, up = product(_dropped_out(x, layer.adapters), _down(layer.adapters)), _up(layer)
    rows, K = weight.shape
    N, M = rows // 2 if activation in _GATED else rows, x.numel() // K
    y, slopes = x.new_empty(*x.shape[:-1], N), None
    if activation != NONE:
        slopes = x.new_empty(*x.shape[:-1], rows)
    R = u.size(-1)
    scratch = panels(gated_columns(N) if activation in _GATED else N, (K + R) // 2)
    call("frozen_linear", x, weight, layer.bias, u, up, y, slopes, scratch, M, N, K, R, activation)
    return y, slopes, u


def _backward(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    layer: FrozenLayer,
    slopes: Tensor | None = None,
    activation: int = NONE,
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of x, times the slopes of the activation that made x, and the gradients of A and
    B if there are adapters."""
    weight, adapters = _weight(layer, x), layer.adapters
    grad_u = mask = down = None
    grads = list[Tensor]()
    if adapters:
        grad_u, down, mask = input_gradient(grad, _up(layer)), _down(adapters), adapters.mask
        (grad_a,) = weight_gradients(grad_u, _dropped_out(x, adapters), has_bias=False)
        (grad_b,) = weight_gradients(u, grad, has_bias=False)
        grads = [grad_a[: len(adapters.a)], _grad_b(grad_b, adapters)]
    (N, K), R = weight.shape, u.size(-1)
    grad_x = torch.empty_like(x if slopes is None else slopes)
    made = grad_u, down, mask, slopes, grad_x, panels(K, (N + R) // 2)
    call("frozen_input_gradient", grad, weight, *made, x.numel() // K, N, K, R, activation)
    return grad_x, grads


def _weight(layer: FrozenLayer, x: Tensor) -> Tensor:
    """W (N, K) bf16, for x (..., K)."""
    whole = dequantized(layer.values, layer.scales, layer.kind, x.size(-1), x.dtype)
    return whole.contiguous()


def _dropped_out(x: Tensor, adapters: Adapters) -> Tensor:
    return x if adapters.mask is None else x * adapters.mask


def _down(adapters: Adapters) -> Tensor:
    """A (R, K)."""
    return F.pad(adapters.a, (0, 0, 0, 1)) if len(adapters.a) % 2 else adapters.a.contiguous()


def _up(layer: FrozenLayer) -> Tensor:
    """scale B (N, R), block by block: each adapter's B in its own rows and columns."""
    adapters = layer.adapters
    assert adapters
    count = len(adapters.a)
    up = adapters.b.new_zeros(len(layer.values), count + count % 2)
    for span, columns, b in _adapter_blocks(adapters, adapters.b):
        up[span, columns] = b
    return up.mul_(adapters.scale)


def _grad_b(grad: Tensor, adapters: Adapters) -> Tensor:
    """The gradient of B, from the transposed gradient (R, N) of `_up`."""
    found = torch.empty_like(adapters.b)
    for span, columns, part in _adapter_blocks(adapters, found):
        torch.mul(grad[columns, span].t(), adapters.scale, out=part)
    return found


def _adapter_blocks(adapters: Adapters, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield each adapter's outputs, its columns of u, and its part of a tensor of B's shape."""
    rank, widths = b.size(1), [span.stop - span.start for span in adapters.spans]
    for number, (span, part) in enumerate(zip(adapters.spans, torch.split(b, widths), strict=True)):
        yield span, slice(number * rank, (number + 1) * rank), part


# --- operators


def _layer(given: Given, tensors: list[Tensor]) -> FrozenLayer:
    """The layer; `tensors` are all but its input."""
    return FrozenLayer.read(iter(tensors), iter(given.constants), iter(given.numbers))


def _linear(given: Given) -> list[Tensor]:
    """The output, and u for the backward pass."""
    x, *tensors = contiguous(given.tensors)
    y, _, u = _forward(x, _layer(given, tensors))
    return [y, u]


def _linear_backward(grad: Tensor, given: Given, kept: list[Tensor]) -> list[Tensor]:
    grad, x, *tensors = contiguous([grad, *given.tensors])
    layer = _layer(given, tensors)
    grad_x, grads = _backward(grad, x, kept[0], layer)
    return [grad_x, *grads]


def _linear_shapes(given: Given) -> list[Tensor]:
    x, *tensors = given.tensors
    layer = _layer(given, tensors)
    return [x.new_empty(*x.shape[:-1], len(layer.values)), _empty_u(x, layer)]


def _empty_u(x: Tensor, layer: FrozenLayer) -> Tensor:
    """An empty tensor of u's shape."""
    count = len(layer.adapters.a) if layer.adapters else 0
    return x.new_empty(*x.shape[:-1], count + count % 2)


def _layers(given: Given, tensors: list[Tensor]) -> tuple[int, FrozenLayer, FrozenLayer]:
    """An MLP's activation and layers; `tensors` are all but its input."""
    rest = iter(tensors), iter(given.constants), iter(given.numbers)
    activation = int(next(rest[2]))
    return activation, FrozenLayer.read(*rest), FrozenLayer.read(*rest)


def _mlp(given: Given) -> list[Tensor]:
    """The output, and for the backward pass the activation's values and slopes, and both u."""
    x, *tensors = contiguous(given.tensors)
    activation, first, second = _layers(given, tensors)
    inner, slopes, u = _forward(x, first, activation)
    assert slopes is not None
    y, _, second_u = _forward(inner, second)
    return [y, inner, slopes, u, second_u]


def _mlp_backward(grad: Tensor, given: Given, kept: list[Tensor]) -> list[Tensor]:
    grad, x, *tensors = contiguous([grad, *given.tensors])
    activation, first, second = _layers(given, tensors)
    inner, slopes, u, second_u = kept
    grad_inner, second_grads = _backward(grad, inner, second_u, second, slopes, activation)
    grad_x, grads = _backward(grad_inner, x, u, first)
    return [grad_x, *grads, *second_grads]


def _mlp_shapes(given: Given) -> list[Tensor]:
    x, *tensors = given.tensors
    activation, first, second = _layers(given, tensors)
    rows = len(first.values)
    inner = x.new_empty(*x.shape[:-1], rows // 2 if activation in _GATED else rows)
    y, slopes = (x.new_empty(*x.shape[:-1], width) for width in (len(second.values), rows))
    return [y, inner, slopes, _empty_u(x, first), _empty_u(x, second)]


_LINEAR = Operator("frozen_linear", _linear, _linear_backward, _linear_shapes)
_MLP = Operator("frozen_mlp", _mlp, _mlp_backward, _mlp_shapes)
