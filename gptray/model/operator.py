"""A function with its gradient, for eager mode and for torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptray.model.autograd_context import OperatorContext

Tensors = list[Tensor]


class Given(NamedTuple):
    """The arguments of an operator; constants have no gradient."""

    tensors: Tensors
    constants: Tensors
    numbers: list[float]


_Forward = Callable[[Given], Tensors]
_Backward = Callable[[Tensor, Given, Tensors], Tensors]


class Operator:
    """A function of tensors, of constants (without gradient) and of numbers, with its gradient.

    forward: returns the result, then the tensors that the backward pass needs. backward: takes the
    result's gradient, the arguments and those tensors (after the result, with keeps_result), and
    returns the tensors' gradients. Without keeps_inputs it gets no tensors and must be plain
    PyTorch, which infers its own shapes. In eager mode both are called directly; torch.compile gets
    opaque custom operators and learns forward's shapes from `shapes`.
    """

    def __init__(
        self,
        name: str,
        forward: _Forward,
        backward: _Backward,
        shapes: _Forward,
        *,
        keeps_inputs: bool = True,
        keeps_result: bool = False,
    ) -> None:
        first_kept = 0 if keeps_result else 1

        def keep(ctx: OperatorContext, inputs: Given, output: Tensors) -> None:
            tensors, constants, ctx.numbers = inputs
            tensors = tensors if keeps_inputs else []
            ctx.count, ctx.constant_count = len(tensors), len(constants)
            ctx.save_for_backward(*tensors, *constants, *output[first_kept:])

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(
                ctx: OperatorContext, count: int, numbers: list[float], *tensors: Tensor
            ) -> Tensor:
                given = Given(list(tensors[:count]), list(tensors[count:]), numbers)
                outputs = forward(given)
                keep(ctx, given, outputs)
                return outputs[0]

            @staticmethod
            def backward(ctx: OperatorContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
                found = backward(grads[0], *_saved(ctx))
                return None, None, *found, *[None] * ctx.constant_count

        @torch.library.custom_op(f"gptray::{name}", mutates_args=())
        def compiled(inputs: Tensors, constants: Tensors, numbers: list[float]) -> Tensors:
            return forward(Given(inputs, constants, numbers))

        def flat_backward(
            grad: Tensor, inputs: Tensors, constants: Tensors, kept: Tensors, numbers: list[float]
        ) -> Tensors:
            return backward(grad, Given(inputs, constants, numbers), kept)

        compiled_backward = torch.library.custom_op(
            f"gptray::{name}_backward", flat_backward, mutates_args=()
        )

        def differentiate(
            ctx: OperatorContext, grads: Tensors
        ) -> tuple[Tensors, list[None], list[None] | None]:
            (tensors, constants, numbers), kept = _saved(ctx)
            found = compiled_backward(grads[0], tensors, constants, kept, numbers)
            # PyTorch takes an empty list of numbers for a list of tensors.
            return found, [None] * ctx.constant_count, None if ctx.numbers else []

        compiled.register_fake(lambda *given: shapes(Given(*given)))
        compiled_backward.register_fake(_like_inputs if keeps_inputs else flat_backward)
        compiled.register_autograd(differentiate, setup_context=keep)
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


def _like_inputs(grad: Tensor, inputs: Tensors, *rest: object) -> Tensors:
    return [x.new_empty(x.shape) for x in inputs]


def _saved(ctx: OperatorContext) -> tuple[Given, Tensors]:
    """The arguments, and the tensors that forward saved."""
    saved, stop = list(ctx.saved_tensors), ctx.count + ctx.constant_count
    return Given(saved[: ctx.count], saved[ctx.count : stop], ctx.numbers), saved[stop:]
