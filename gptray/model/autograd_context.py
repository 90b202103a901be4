"""Types of the context that autograd functions pass from forward to backward."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """The saved tensors; functions add other values as attributes."""

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class LinearContext(Context, Protocol):
    has_bias: bool


class FrozenContext(Context, Protocol):
    kind: str
    inputs: int


class AdaptedContext(Context, Protocol):
    kind: str
    spans: tuple[slice, ...]
    scale: float
    reads_all: bool


class NormContext(Context, Protocol):
    eps: float
    has_bias: bool


class OperatorContext(Context, Protocol):
    """For an `Operator`: how many tensors and constants (without gradient) it has; its numbers."""

    count: int
    constant_count: int
    numbers: list[float]
