"""Landing: a run whose stable part has ended cools down from its best checkpoint.

At a constant learning rate, validation loss reaches a plateau, and a cool-down lowers it further.
It begins at the best checkpoint, so it does not matter how long the run has overfitted since.

Step numbers continue from the last stable one, but a step's batch and dropout depend only on the
number of updates that its weights have had. So a landing equals, bit for bit, that of a run whose
stable part ended at the checkpoint it went back to. No torch here, because drivers import it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import PositiveInt

from gptray.config import Config
from gptray.storage.record import MetricsRow

Phase = Literal["stable", "landing"]
PHASES: tuple[Phase, Phase] = ("stable", "landing")
Reason = Literal["max_steps", "patience"]


@dataclass(frozen=True)
class Landing:
    """A cool-down of `steps` steps after step `start`, from the weights of step `back_to`.

    reason: why the stable part ended.
    """

    start: int
    back_to: PositiveInt
    steps: PositiveInt
    reason: Reason

    @property
    def end(self) -> int:
        """The last step of the run."""
        return self.start + self.steps

    def position(self, step: int) -> int:
        """The number of updates that the weights have had at a step."""
        return step - self.start + self.back_to

    def learning_rate(self, step: int, *, lr: float, min_lr: float) -> float:
        """The learning rate of the update from `step` to `step + 1`: 1-sqrt from `lr` to `min_lr`.

        Haegele et al. 2024 (arXiv 2405.18392) found this shape better than linear and cosine.
        """
        return min_lr + (lr - min_lr) * (1 - math.sqrt((step - self.start) / self.steps))


def rows_of(phase: Phase, rows: Sequence[MetricsRow]) -> list[MetricsRow]:
    """The rows of one phase; all rows of a run that does not land are stable."""
    return [row for row in rows if row.get("phase", "stable") == phase]


def landing_gain(rows: Sequence[MetricsRow]) -> float | None:
    """How many nats the landing's lowest validation loss is below the stable part's.

    Negative if it is higher; None if the run has not landed.
    """
    stable, landing = (
        [row["val_loss"] for row in rows_of(phase, rows) if "val_loss" in row] for phase in PHASES
    )
    return min(stable) - min(landing) if stable and landing else None


def why_stopped(rows: Sequence[MetricsRow], config: Config) -> Reason:
    """Why training, or the stable part of a run that landed, ended; `rows` are all of the run's."""
    last = rows_of("stable", rows)[-1]["step"]
    return "max_steps" if last >= config.stable_steps else "patience"
