"""A sweep's learning curves, and the roles of its trials in all figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gptray.reports.chart import Chart, Mark, Role, Series, thinned
from gptray.reports.picture import XY
from gptray.tuning.levels import assignment
from gptray.tuning.ranking import Ranking, is_wrong
from gptray.tuning.sweep_record import Trial, rungs
from gptray.tuning.trial_plan import score

# The most points of a curve; few, since there are many curves.
CURVE_POINTS = 100
# Up to this share of the trials, the worst, may be above the chart.
OUT_OF_PICTURE = 0.1
NAMES: dict[Role, str] = {
    "cut": "stopped at a rung",
    "wrong": "diverged or failed",
    "whole": "not stopped",
    "own": "the config as it is",
    "winner": "the best trial",
}


def role_of(trial: Trial, standing: Ranking) -> Role:
    """The role that decides how a trial is drawn."""
    if standing.best and trial.name == standing.best.name:
        return "winner"
    if standing.own and trial.name == standing.own.name:
        return "own"
    if is_wrong(trial):
        return "wrong"
    return "cut" if trial.outcome == "stopped" else "whole"


def learning_charts(standing: Ranking) -> list[Chart]:
    """A chart of all trials' validation loss over steps; empty before the first evaluation."""
    series = [_series(trial, standing) for trial in standing.sweep.trials]
    series = sorted(
        (one for one in series if one.points), key=lambda one: list(NAMES).index(one.role)
    )
    if not series:
        return []
    low, high = _range(series)
    first = min(one.points[0][0] for one in series)
    last = max(trial.max_steps for trial in standing.sweep.trials)
    best = standing.best
    marks = []
    if best and best.best:
        label = f"best: trial {best.name}, step {best.best['step']:,} ({score(best):.3f})"
        marks.append(Mark("best", best.best["step"], score(best), label))
    return [
        Chart(
            key="trials",
            title="Validation loss",
            unit="bits per byte",
            series=tuple(series),
            last=last,
            low=low,
            high=high,
            marks=tuple(marks),
            first=first if first < last else 0.0,
            rungs=tuple(step for step in rungs(standing.sweep.config) if first <= step < last),
        )
    ]


def _series(trial: Trial, standing: Ranking) -> Series:
    role = role_of(trial, standing)
    points = [(row["step"], row["val_bpb"]) for row in trial.rows if "val_bpb" in row]
    return Series(NAMES[role], role, thinned(points, CURVE_POINTS), hint=hint(trial, standing))


def hint(trial: Trial, standing: Ranking) -> str:
    """A trial's tooltip: its name, lowest loss and settings."""
    best = trial.best
    reached = f" {best['val_bpb']:.4f} at step {best['step']:,}" if best else ""
    return f"{trial.name}{reached}: {settings_words(trial, standing)}"


def settings_words(trial: Trial, standing: Ranking) -> str:
    """A trial's values of its settings, in words."""
    return ", ".join(
        assignment(setting, trial.name)
        for setting in standing.settings
        if trial.name in setting.values
    )


def _range(series: Sequence[Series]) -> XY:
    """The range of values to show: the lowest losses of all but the worst trials, with a margin."""
    ends = sorted(min(y for _, y in one.points) for one in series)
    low, high = ends[0], ends[math.ceil((1 - OUT_OF_PICTURE) * len(ends)) - 1]
    room = (high - low) or abs(high) or 1.0
    return low - 0.08 * room, high + 0.3 * room
