"""Diagnoses from a run's metrics whether it overfits, since when, and what that cost.

A pure function of rows, config and events. `advice` says what to do about it; the report presents
it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from gptray.config import Config
from gptray.reports.run.landed import Landed, Point, landed_of, points_of
from gptray.storage.record import Event, MetricsRow, last_event
from gptray.training.landing import rows_of, why_stopped

# How many evaluations must follow a turn: one or two bad ones are not a trend.
FOLLOWING = 3
# Changes of validation loss below this fraction of it do not matter.
NEGLIGIBLE = 0.002
# A change above this part of it is one, however restless the curve.
NOTABLE = 0.1
# The events that show a run's state.
STATES = ("start", "end", "failure")

Verdict = Literal[
    "none", "single", "overfitting", "unsure", "unstable", "harmed", "stuck", "falling", "level"
]
Ended = Literal["max_steps", "patience", "non_finite"]


@dataclass(frozen=True)
class Diagnosis:
    """What a run's curves say, those of the stable part if the run lands.

    `turned` is the evaluation since which validation loss has been higher for good (see
    `turning_point`); None if it has not turned, or if it is too early to tell. `noise` is the
    standard deviation of validation loss around its trend, in nats. `pace` is seconds per step,
    including evaluations if the run's events tell. `ended` is None for a run that is still training
    or was interrupted. `parameters` are those trained; None, like `epochs_at_best`, if the run does
    not record them. `landed` is None before a landing's first evaluation. `base` is the validation
    loss of `model.init_from`, None without one.
    """

    verdict: Verdict
    points: tuple[Point, ...]
    best: Point | None
    turned: Point | None
    noise: float
    ended: Ended | None
    last_step: int
    max_steps: int
    pace: float | None
    parameters: int | None
    epochs_at_best: float | None
    landed: Landed | None = None
    base: float | None = None

    @property
    def chosen(self) -> Point | None:
        """The evaluation of the run's `model/`: the best one, including the landing."""
        return self.landed.best if self.landed and self.landed.gain > 0 else self.best

    @property
    def last(self) -> Point | None:
        return self.points[-1] if self.points else None

    @property
    def steps_after_best(self) -> int:
        """Steps trained after the best evaluation, not counting a landing's."""
        last = self.landed.start if self.landed else self.last_step
        return last - self.best.step if self.best else 0

    @property
    def worse(self) -> float:
        """How many nats the last validation loss is above the best."""
        return self.last.val_loss - self.best.val_loss if self.last and self.best else 0.0

    @property
    def steps_saved(self) -> int:
        """Steps that early stopping saved."""
        return self.max_steps - self.last_step if self.ended == "patience" else 0

    def seconds(self, steps: int) -> float | None:
        """How long that many steps took or would take."""
        return steps * self.pace if self.pace is not None else None


def diagnose(rows: Sequence[MetricsRow], config: Config, events: Sequence[Event] = ()) -> Diagnosis:
    """Judge a run by its rows of metrics.jsonl; events give more exact times, size and ending.

    The verdict is the first that fits: no evaluation; unstable (a non-finite number); harmed (none
    better than `model.init_from`); a single evaluation; unstable (training loss rose too);
    overfitting (turned for good); unsure (risen, but for fewer than three evaluations); stuck
    (nothing learnt); falling; level.
    """
    every, rows = rows, rows_of("stable", rows)
    points = points_of(rows)
    best = min(points, key=lambda point: point.val_loss) if points else None
    turn = turning_point([point.val_loss for point in points], min_delta=config.train.min_delta)
    ended = _ended(every, points, config, events)
    start, before = last_event(events, "start"), last_event(events, "base")
    base = before["val_loss"] if before else None
    lowest = min((one.val_loss for one in points_of(every)), default=0)
    epochs = {row["step"]: row["epoch"] for row in rows if row.get("epoch")}
    is_harmed = base is not None and bool(points) and lowest >= base and ended != "non_finite"
    verdict = "harmed" if is_harmed else _verdict(points, best, turn, ended, rows, config)
    return Diagnosis(
        verdict=verdict,
        points=points,
        best=best,
        turned=None if turn.index is None else points[turn.index],
        noise=turn.noise,
        ended=ended,
        last_step=every[-1]["step"] if every else 0,
        max_steps=config.train.max_steps,
        pace=_pace(rows, config, events),
        parameters=start.get("trained", start["parameters"]) if start else None,
        epochs_at_best=epochs.get(best.step) if best else None,
        landed=landed_of(every, best, events),
        base=base,
    )


@dataclass(frozen=True)
class Turn:
    """Where a curve turned for good (None: nowhere), its noise, the band that noise explains."""

    index: int | None
    noise: float
    band: float


def turning_point(losses: Sequence[float], *, min_delta: float = 0.0) -> Turn:
    """Find the evaluation since which validation loss has been higher for good.

    It is the last one within `band` of the lowest, if at least three follow it; by definition, all
    of these are above the band.

    band = noise x (2 + sqrt(2 ln n)), but at most a tenth of the lowest loss, since a few
    evaluations cannot tell noise from a leap, and at least 0.2% of it, and min_delta. The lowest
    of n noisy values of a level curve is about noise x sqrt(2 ln n) below it, so a level curve
    stays in the band. `noise` is the standard deviation around the trend, 1.4826 x median |third
    difference| / sqrt(20), in which a smooth trend cancels out; n and noise are those of the part
    of the curve from where it first got as low as it ended. A long curve's differences span
    sixteenths of it, because the errors of neighbouring evaluations are correlated.
    """
    if not losses:
        return Turn(None, 0.0, 0.0)
    begin = next(i for i, loss in enumerate(losses) if loss <= losses[-1])
    basin = losses[begin:]
    noise = _noise(basin)
    lowest = min(losses)
    band = noise * (2 + math.sqrt(2 * math.log(len(basin))))
    band = max(min(band, NOTABLE * abs(lowest)), NEGLIGIBLE * abs(lowest), min_delta)
    last = max(i for i, loss in enumerate(losses) if loss <= lowest + band)
    follow = len(losses) - 1 - last
    return Turn(last if follow >= FOLLOWING else None, noise, band)


def _noise(losses: Sequence[float]) -> float:
    lag = max(1, len(losses) // 16)
    thirds = [
        abs(losses[i + 3 * lag] - 3 * losses[i + 2 * lag] + 3 * losses[i + lag] - losses[i])
        for i in range(len(losses) - 3 * lag)
    ]
    return 1.4826 * median(thirds) / math.sqrt(20) if thirds else 0.0


def _verdict(
    points: Sequence[Point],
    best: Point | None,
    turn: Turn,
    ended: Ended | None,
    rows: Sequence[MetricsRow],
    config: Config,
) -> Verdict:
    if ended == "non_finite":
        return "unstable"
    if best is None or len(points) < 2:
        return "single" if points else "none"
    rise = points[-1].val_loss - best.val_loss
    if rise > turn.band:
        since = best if turn.index is None else points[turn.index]
        if _training_rose(points, since, rows[0]["train_loss"]):
            return "unstable"
        return "unsure" if turn.index is None else "overfitting"
    if not config.model.init_from and _is_stuck(rows, best):
        return "stuck"
    return "falling" if ended != "patience" and _is_falling(points) else "level"


def _training_rose(points: Sequence[Point], since: Point, began: float) -> bool:
    """Whether training loss rose, too, which is not overfitting.

    It rose half as much as validation loss, or to notably more than it was when training began.
    """
    before = [point for point in points if point.step <= since.step][-FOLLOWING:]
    after = [point for point in points if point.step > since.step][-FOLLOWING:]
    ended = fmean(p.train_loss for p in after)
    train = ended - fmean(p.train_loss for p in before)
    val = fmean(p.val_loss for p in after) - fmean(p.val_loss for p in before)
    return train > val / 2 or ended > (1 + NOTABLE) * began


def _is_stuck(rows: Sequence[MetricsRow], best: Point) -> bool:
    """Whether neither loss ever got 2% below where training began."""
    began = rows[0]["train_loss"]
    lowest = min(best.val_loss, min(row["train_loss"] for row in rows))
    return bool(lowest > 0.98 * began)


def _is_falling(points: Sequence[Point]) -> bool:
    """Whether the mean of the last quarter is below the previous one's by more than noise explains.

    A last quarter that ends no lower than it began counts as level.
    """
    tail = [point.val_loss for point in points[len(points) // 2 :]]
    if len(tail) < 2:
        tail = [point.val_loss for point in points]
    size = len(tail) // 2
    half = max(1, size // 2)
    if size > 1 and fmean(tail[-half:]) >= fmean(tail[-size:][:half]):
        return False
    drop = fmean(tail[:size]) - fmean(tail[-size:])
    return drop > max(2 * _noise(tail) * math.sqrt(2 / size), NEGLIGIBLE * abs(tail[-1]))


def _ended(
    rows: Sequence[MetricsRow], points: Sequence[Point], config: Config, events: Sequence[Event]
) -> Ended | None:
    """How the run ended, preferably by its event, since min_delta affects what patience counts."""
    told = last_event(events, *STATES)
    if told and told["event"] == "end":
        return told["stopped"]
    if has_failed(events):
        return None
    if config.optim.lands:
        begun = last_event(events, "landing")
        if begun and rows_of("landing", rows) and rows[-1]["step"] >= begun["until"]:
            return why_stopped(rows, config)
        return None
    if rows and rows[-1]["step"] >= config.train.max_steps:
        return "max_steps"
    patience = config.train.patience
    losses = [point.val_loss for point in points]
    if patience and losses and len(losses) - 1 - losses.index(min(losses)) >= patience:
        return "patience"
    return None


def has_failed(events: Sequence[Event]) -> bool:
    """Whether a run's last known state is a failure, so that even its last step may be unsaved."""
    told = last_event(events, *STATES)
    return told is not None and told["event"] == "failure"


def _pace(rows: Sequence[MetricsRow], config: Config, events: Sequence[Event]) -> float | None:
    """Median seconds per step between evaluations without a restart, else by the rows' rates."""
    sittings: list[list[tuple[int, float]]] = [[]]
    for event in events:
        if event["event"] == "start":
            sittings.append([])
        elif event["event"] == "evaluated":
            sittings[-1].append((event["step"], event["time"]))
    paces = [
        (time - before) / (step - first)
        for sitting in sittings
        for (first, before), (step, time) in zip(sitting, sitting[1:], strict=False)
        if step > first and time > before
    ]
    rates = [row["tokens_per_sec"] for row in rows if row.get("tokens_per_sec")]
    if paces:
        return median(paces)
    return config.tokens_per_step / median(rates) if rates else None
