"""A function with its gradient, for eager mode and for torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptray.model.autograd_context import OperatorContext

# Tensors, constants and numbers.
_Arguments = tuple[list[Tensor], list[Tensor], list[float]]


class Operator:
    """A function of tensors, of constants that have no gradient, and of numbers.

    forward: takes tensors, constants and numbers, and gives the result and what else the backward
    pass needs. backward: takes the result's gradient, the tensors, the constants, that (with
    keeps_result the result before it), and the numbers, and gives the tensors' gradients. In eager
    mode they are called as they are; torch.compile gets operators that it calls and does not look
    into, and learns from `shapes` what forward gives.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[list[Tensor], list[Tensor], list[float]], list[Tensor]],
        backward: Callable[
            [Tensor, list[Tensor], list[Tensor], list[Tensor], list[float]], list[Tensor]
        ],
        shapes: Callable[[list[Tensor], list[Tensor], list[float]], list[Tensor]],
        *,
        keeps_result: bool = False,
    ) -> None:
        first_kept = 0 if keeps_result else 1

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(
                ctx: OperatorContext, count: int, numbers: list[float], *tensors: Tensor
            ) -> Tensor:
                inputs, constants = list(tensors[:count]), list(tensors[count:])
                outputs = forward(inputs, constants, numbers)
                _keep(ctx, (inputs, constants, numbers), outputs[first_kept:])
                return outputs[0]

            @staticmethod
            def backward(ctx: OperatorContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
                found = backward(grads[0], *_kept(ctx), ctx.numbers)
                return None, None, *found, *[None] * ctx.constant_count

        @torch.library.custom_op(f"gptray::{name}", mutates_args=())
        def compiled(
            inputs: list[Tensor], constants: list[Tensor], numbers: list[float]
        ) -> list[Tensor]:
            return forward(inputs, constants, numbers)

        @torch.library.custom_op(f"gptray::{name}_backward", mutates_args=())
        def compiled_backward(
            grad: Tensor,
            inputs: list[Tensor],
            constants: list[Tensor],
            kept: list[Tensor],
            numbers: list[float],
        ) -> list[Tensor]:
            return backward(grad, inputs, constants, kept, numbers)

        def differentiate(
            ctx: OperatorContext, grads: list[Tensor]
        ) -> tuple[list[Tensor], list[None], list[None] | None]:
            found = compiled_backward(grads[0], *_kept(ctx), ctx.numbers)
            # An empty list of numbers passes for one of tensors.
            return found, [None] * ctx.constant_count, None if ctx.numbers else []

        compiled.register_fake(shapes)
        compiled_backward.register_fake(
            lambda grad, inputs, constants, kept, numbers: [x.new_empty(x.shape) for x in inputs]
        )
        compiled.register_autograd(
            differentiate,
            setup_context=lambda ctx, inputs, output: _keep(ctx, inputs, output[first_kept:]),
        )
        self._eager, self._compiled = Eager, compiled

    def __call__(
        self,
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor] = (),
        numbers: Sequence[float] = (),
    ) -> Tensor:
        if torch.compiler.is_compiling():
            result: Tensor = self._compiled(list(inputs), list(constants), list(numbers))[0]
            return result
        y: Tensor = self._eager.apply(len(inputs), list(numbers), *inputs, *constants)  # type: ignore[no-untyped-call]
        return y


def _keep(ctx: OperatorContext, arguments: _Arguments, kept: list[Tensor]) -> None:
    inputs, constants, numbers = arguments
    ctx.count, ctx.constant_count, ctx.numbers = len(inputs), len(constants), numbers
    ctx.save_for_backward(*inputs, *constants, *kept)


def _kept(ctx: OperatorContext) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The inputs, the constants, and what forward gave besides."""
    saved, stop = list(ctx.saved_tensors), ctx.count + ctx.constant_count
    return saved[: ctx.count], saved[ctx.count : stop], saved[stop:]
