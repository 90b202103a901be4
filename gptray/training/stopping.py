"""Early stopping and the best evaluation so far, as a value that a checkpoint can store."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, NonNegativeInt

# Infinite before the first evaluation, which JSON stores as null.
Loss = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient norm is NaN or infinite; nothing was updated or saved with it."""


@dataclass(frozen=True)
class EarlyStopping:
    """The progress of validation loss, in nats per token.

    `best_*` is the lowest loss so far, `averaged` whether the averaged weights reached it.
    `bad_evals` counts the evaluations since one beat `bar` by `min_delta` or more; `patience`
    limits it (Prechelt 1998).
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    best_step: NonNegativeInt = 0
    best_val_loss: Loss = math.inf
    bar: Loss = math.inf
    bad_evals: NonNegativeInt = 0
    averaged: bool = False

    def after(
        self, step: int, val_loss: float, *, min_delta: float, averaged: bool = False
    ) -> EarlyStopping:
        """The progress after the evaluation at `step`."""
        is_best = val_loss < self.best_val_loss
        is_better = val_loss < self.bar and self.bar - val_loss >= min_delta
        return EarlyStopping(
            best_step=step if is_best else self.best_step,
            best_val_loss=val_loss if is_best else self.best_val_loss,
            bar=val_loss if is_better else self.bar,
            bad_evals=0 if is_better else self.bad_evals + 1,
            averaged=averaged if is_best else self.averaged,
        )

    def exhausted(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations brought no improvement."""
        return patience is not None and self.bad_evals >= patience
