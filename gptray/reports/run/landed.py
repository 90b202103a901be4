"""The evaluations of a run, and of its landing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptray.storage.record import Event, MetricsRow, last_event
from gptray.training.landing import rows_of


@dataclass(frozen=True)
class Point:
    """One evaluation: losses in nats per token, `gap` = val_loss - train_loss."""

    step: int
    train_loss: float
    val_loss: float
    gap: float


@dataclass(frozen=True)
class Landed:
    """The evaluations of a landing after step `start`, which went back to step `back_to`.

    gain: how many nats the best is below the stable part's best; negative if it is above.
    """

    start: int
    back_to: int
    points: tuple[Point, ...]
    gain: float

    @property
    def best(self) -> Point:
        return min(self.points, key=lambda point: point.val_loss)


def points_of(rows: Sequence[MetricsRow]) -> tuple[Point, ...]:
    return tuple(
        Point(row["step"], row["train_loss"], row["val_loss"], row["gap"])
        for row in rows
        if "val_loss" in row
    )


def landed_of(
    rows: Sequence[MetricsRow], best: Point | None, events: Sequence[Event]
) -> Landed | None:
    """The landing in a run's rows. best: the best evaluation before it."""
    points, begun = points_of(rows_of("landing", rows)), last_event(events, "landing")
    if not points or best is None:
        return None
    back_to = begun["back_to"] if begun else best.step
    gain = best.val_loss - min(point.val_loss for point in points)
    return Landed(rows_of("stable", rows)[-1]["step"], back_to, points, gain)
