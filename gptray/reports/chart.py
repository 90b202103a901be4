"""The curves of a run as plain data; `gptray.reports.curves` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from gptray.reports.picture import XY
from gptray.reports.run.diagnosis import Diagnosis
from gptray.storage.record import MetricsRow
from gptray.wording import decimals

# Roles of a run's curves, then of a sweep's trials.
Role = Literal["train", "val", "landed", "single", "cut", "whole", "wrong", "own", "winner"]

# The most points of a curve; a page cannot show more.
MOST_POINTS = 400
# Up to this many evaluations get a dot each.
MOST_DOTS = 60
# Losses in this first part of the steps may leave the chart: they may fall from 11 to 6 there, but
# what matters happens between 6.0 and 6.2.
BEGINNING = 0.1


@dataclass(frozen=True)
class Series:
    """One curve. `role` decides its colour; curves of one role share a name. hint: the tooltip."""

    name: str
    role: Role
    points: tuple[XY, ...]
    hint: str = ""

    @property
    def has_dots(self) -> bool:
        """Whether each point is one measurement and there is room for dots."""
        return self.role in ("val", "landed") and len(self.points) <= MOST_DOTS

    @property
    def has_end(self) -> bool:
        """Whether a dot marks the end of the curve."""
        return self.role in ("cut", "whole", "wrong", "own", "winner")


@dataclass(frozen=True)
class Mark:
    """A labelled point at a step."""

    role: Literal["best", "turned", "landed"]
    step: float
    value: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Curves over steps up to `last`, for values between `low` and `high`.

    first: the leftmost step; if above 0, the scale of steps is logarithmic. rungs: steps marked by
    a line.
    """

    key: str
    title: str
    unit: str
    series: tuple[Series, ...]
    last: float
    low: float
    high: float
    marks: tuple[Mark, ...] = ()
    first: float = 0.0
    rungs: tuple[float, ...] = ()

    @property
    def legend(self) -> tuple[Series, ...]:
        """One curve of each role."""
        return tuple({series.role: series for series in self.series}.values())


def run_charts(rows: Sequence[MetricsRow], diagnosis: Diagnosis) -> list[Chart]:
    """Charts of a run's loss, learning rate and gradient norm; empty if nothing was logged."""
    if not rows:
        return []
    return [
        _loss_chart(rows, diagnosis),
        _single("lr", "Learning rate", "", rows),
        _single("grad_norm", "Gradient norm", "before clipping", rows),
    ]


def thinned(points: Sequence[XY], most: int = MOST_POINTS) -> tuple[XY, ...]:
    """Thin to about `most` points: the lowest and highest of each stretch, and the last point."""
    if len(points) <= most:
        return tuple(points)
    stretches = most // 2
    kept = []
    for number in range(stretches):
        first, end = (len(points) * n // stretches for n in (number, number + 1))
        stretch = points[first:end]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return (*kept, points[-1]) if kept[-1] != points[-1] else tuple(kept)


def averaged(points: Sequence[XY], most: int = MOST_POINTS // 2) -> tuple[XY, ...]:
    """Thin to at most `most` points, the means of stretches; for values that are mostly noise."""
    size = -(-len(points) // most) if points else 1
    stretches = [points[first : first + size] for first in range(0, len(points), size)]
    return tuple((stretch[-1][0], fmean(y for _, y in stretch)) for stretch in stretches)


def _loss_chart(rows: Sequence[MetricsRow], diagnosis: Diagnosis) -> Chart:
    train = averaged([(row["step"], row["train_loss"]) for row in rows])
    val = thinned([(point.step, point.val_loss) for point in diagnosis.points])
    landing = _landing_curve(diagnosis)
    low, high = _range([train, val, landing], from_zero=False)
    return Chart(
        key="loss",
        title="Loss",
        unit="nats per token",
        series=(
            Series("training", "train", train),
            Series("validation", "val", val),
            *([Series("validation, landing", "landed", landing)] if landing else []),
        ),
        last=rows[-1]["step"],
        low=low,
        high=high,
        marks=_marks(diagnosis),
    )


def _landing_curve(diagnosis: Diagnosis) -> tuple[XY, ...]:
    """Validation loss of a landing, from the evaluation that it went back to."""
    landed = diagnosis.landed
    if landed is None:
        return ()
    before = [point for point in diagnosis.points if point.step == landed.back_to]
    return thinned([(point.step, point.val_loss) for point in (*before, *landed.points)])


def _marks(diagnosis: Diagnosis) -> tuple[Mark, ...]:
    best, turned = diagnosis.best, diagnosis.turned
    if best is None:
        return ()
    landed = diagnosis.landed
    places = decimals(landed.gain if landed else diagnosis.worse or 1.0)
    value = f"{best.val_loss:.{places}f}"
    marks = [Mark("best", best.step, best.val_loss, f"best: step {best.step:,} ({value})")]
    if turned and diagnosis.verdict == "overfitting":
        marks.append(Mark("turned", turned.step, turned.val_loss, f"turned: step {turned.step:,}"))
    if landed:
        point = landed.best
        label = f"landed: step {point.step:,} ({point.val_loss:.{places}f})"
        marks.append(Mark("landed", point.step, point.val_loss, label))
    return tuple(marks)


def _single(
    key: Literal["lr", "grad_norm"], title: str, unit: str, rows: Sequence[MetricsRow]
) -> Chart:
    points = [(row["step"], row[key]) for row in rows]
    low, high = _range([points], from_zero=True)
    return Chart(
        key=key,
        title=title,
        unit=unit,
        series=(Series(title.lower(), "single", thinned(points)),),
        last=rows[-1]["step"],
        low=low,
        high=high,
    )


def _range(curves: Sequence[Sequence[XY]], *, from_zero: bool) -> XY:
    """The range of values to show: those after the beginning, with a margin."""
    last = max(curve[-1][0] for curve in curves if curve)
    values = [y for curve in curves for x, y in curve if x >= BEGINNING * last]
    low, high = (0.0 if from_zero else min(values)), max(values)
    room = 0.05 * ((high - low) or abs(high) or 1.0)
    return (low if from_zero else low - room), high + room
