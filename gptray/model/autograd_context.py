"""What autograd functions keep from their forward for their backward pass."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """The tensors that were saved; functions add what else they need as attributes."""

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
    """Of a function of `count` tensors, `constant_count` without a gradient, and numbers."""

    count: int
    constant_count: int
    numbers: list[float]
