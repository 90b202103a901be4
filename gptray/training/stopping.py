"""Early stopping and the best evaluation so far, as a value that a checkpoint can carry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from gptray.stored import is_whole


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient norm is NaN or infinite; nothing was updated or saved with it."""


@dataclass(frozen=True)
class Progress:
    """What the evaluations so far say. Losses are in nats per token.

    `best_*` is the lowest validation loss of all, `averaged` whether averaged weights have it.
    `bad_evals` counts the evaluations since one
    was lower than `bar` by `min_delta` or more; it is what `patience` bounds (Prechelt 1998).
    """

    best_step: int = 0
    best_val_loss: float = math.inf
    bar: float = math.inf
    bad_evals: int = 0
    averaged: bool = False

    def after(
        self, step: int, val_loss: float, *, min_delta: float, averaged: bool = False
    ) -> Progress:
        """The progress after the evaluation at `step`."""
        is_best = val_loss < self.best_val_loss
        is_better = val_loss < self.bar and self.bar - val_loss >= min_delta
        return Progress(
            best_step=step if is_best else self.best_step,
            best_val_loss=val_loss if is_best else self.best_val_loss,
            bar=val_loss if is_better else self.bar,
            bad_evals=0 if is_better else self.bad_evals + 1,
            averaged=averaged if is_best else self.averaged,
        )

    def exhausted(self, patience: int | None) -> bool:
        """Whether the run has gone `patience` evaluations without getting better."""
        return patience is not None and self.bad_evals >= patience

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; infinities (no evaluation yet) become null."""
        return {key: None if value == math.inf else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, state: Mapping[str, object]) -> Progress:
        """The inverse of `to_json`. Raises ValueError for anything else."""
        # Checkpoints from before there were averages lack the last.
        match {"averaged": False, **state}:
            case {
                "best_step": best,
                "best_val_loss": loss,
                "bar": bar,
                "bad_evals": bad,
                "averaged": bool(averaged),
                **others,
            }:
                loss, bar = (math.inf if value is None else value for value in (loss, bar))
                if not isinstance(loss, (int, float)) or not isinstance(bar, (int, float)):
                    raise ValueError("it holds no progress of a run")
                if not others and is_whole(best) and is_whole(bad):
                    return cls(best, loss, bar, bad, averaged)
        raise ValueError("it holds no progress of a run")
