"""Estimates what ten more trials of a sweep would gain, and whether they are worth running.

Trials drawn at random are exchangeable, so those that have run tell what the next may achieve.
This module knows scores, and of a sweep's trials only which ones count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptray.config import Config
from gptray.tuning.regression import Floats
from gptray.tuning.sweep_record import Trial, trial_events
from gptray.tuning.trial_plan import entries_of, ranked, score

# How many more trials to judge, and how many random ones must end first: fewer may all have missed
# rare settings that are much better, which their tail cannot reveal.
MORE, ENOUGH = 10, 30
# The tail has at least 4 scores, and a third of all.
ENOUGH_IN_TAIL, TAIL = 4, 3
# The tail's exponents and their prior: 30 is practically exponential; below 0, the tail has no end.
EXPONENTS = np.array([3.0, 5.0, 10.0, 30.0, -4.0, -2.0])[:, None]
PRIOR = np.array([0.1, 0.1, 0.1, 0.4, 0.15, 0.15])[:, None]
# The tail's scale in units of the largest excess: how far beyond it the tail ends, if it does.
_SCALES = np.geomspace(1e-2, 1e3, 40)
ENDS = np.where(EXPONENTS > 0, 1 + _SCALES, -_SCALES)  # (exponents, scales)
# The gains at which the distribution is evaluated, in the same unit.
GAINS = np.concatenate([[0.0], np.geomspace(1e-3, 1e2, 120)])
SURE = 0.95


@dataclass(frozen=True)
class StoppedEarly:
    """Why a sweep ran only `trials` of its trials: the gain of `MORE` others, in bits per byte."""

    trials: int
    of: int
    gain: float
    gain_at_most: float
    min_gain: float

    @classmethod
    def of_sweep(cls, folder: Path) -> StoppedEarly | None:
        """Read it from a sweep's record; None if it did not stop itself or was reopened since."""
        found = [row for row in trial_events(folder) if row["event"] in ("enough", "reopened")]
        if not found or found[-1]["event"] == "reopened":
            return None
        row = found[-1]
        gains = (row["gain"], row["gain_at_most"], row["min_gain"])
        return cls(row["trials"], row["of"], *gains)

    @property
    def words(self) -> str:
        return (
            f"Stopped after {self.trials} of {self.of} trials: {MORE} more would improve the best "
            f"by {self.gain:.4f} bits per byte (95%: by {self.gain_at_most:.4f} at most), "
            f"less than tune.min_gain={self.min_gain:g}; tune.min_gain=0 runs the others."
        )


def judges(config: Config) -> bool:
    """Whether a sweep may stop itself, which needs exchangeable trials, drawn at random.

    Points of a grid are not exchangeable, nor are Optuna's suggestions.
    """
    tune = config.tune
    is_grid = any(entry.kind == "grid" for entry in entries_of(config))
    return tune.min_gain > 0 and tune.search_alg == "random" and not is_grid


def expected_gain(trials: Sequence[Trial]) -> Gain | None:
    """What `MORE` trials would gain, estimated from those that have ended; None if too few have.

    The baseline was not drawn, but counts as the score to beat. Trials that still run or failed for
    a passing reason are left out.
    """
    first = [trial for trial in trials if trial.replicate_of is None]
    ended = [trial for trial in first if trial.has_ended and not trial.passing]
    drawn = [trial for trial in ended if trial.values]
    whole = [trial for trial in drawn if trial.outcome in ("finished", "patience") and trial.best]
    if len(drawn) < ENOUGH or not whole:
        return None
    return Gain.of([score(one) for one in whole], score(ranked(ended)[0]), draws=len(drawn))


@dataclass(frozen=True)
class Gain:
    """How much `MORE` trials would lower the best score: the mean, and the `SURE` upper bound."""

    mean: float
    most: float

    @classmethod
    def of(cls, scores: Sequence[float], best: float, *, draws: int) -> Gain | None:
        """Estimate it from the scores of those of `draws` random trials that ran to their end.

        best: the score to beat. None if there are too few scores.

        The other trials count as failed draws: a trial that waits at a rung is not the best, and of
        ten more, as many will wait. The lowest k scores, a third of all, give the lower tail: a
        score falls below the (k+1)-th, u, with probability k / draws, and then below u - y with
        (1 - y / c)^a, a generalised Pareto distribution (Pickands 1975). It ends at u - c, or never
        if a and c are negative. A loss that is quadratic in d settings near its minimum has
        a = d / 2, normal noise has a practically exponential tail, and a score far ahead of the
        others suggests a heavier one. The prior is flat on the logarithm of the scale. Because of
        the averaging over all tails that fit, the bound holds however often it is checked, as far
        as the prior is right; `benchmarks/min_gain.py` measures how often it does.
        """
        found = np.sort(np.array(scores, float))
        k = max(ENOUGH_IN_TAIL, len(found) // TAIL)
        if len(found) <= k:
            return None
        threshold = found[k]
        excesses = np.maximum(threshold - found[:k], 1e-9)
        unit = float(excesses[0])
        chances = _fitted(excesses / unit)
        # (gains, exponents, scales): the probability that one trial gains more.
        beyond = (threshold - best) / unit + GAINS[:, None, None]
        below = _survival(beyond)
        any_of_them = 1 - (1 - (k + 0.5) / (draws + 1) * below) ** MORE
        exceeded = (any_of_them * chances).sum((1, 2))
        mean = unit * float(np.trapezoid(exceeded, GAINS))
        # `exceeded` is decreasing, and the last gain is beyond any tail that fits.
        bound = GAINS[(exceeded > 1 - SURE).sum()]
        return cls(mean, unit * float(bound))


def _survival(excess: Floats) -> Floats:
    """The share of the tail beyond an excess; 0 beyond the tail's end."""
    with np.errstate(divide="ignore"):
        left = np.log(np.maximum(1 - excess / ENDS, 0))
    found: Floats = np.exp(EXPONENTS * left)
    return found


def _fitted(excesses: Floats) -> Floats:
    """The posterior over tails, (exponents, scales); the largest excess is 1."""
    inside = np.log1p(-excesses / ENDS[:, :, None]).sum(2)
    likelihood = len(excesses) * np.log(EXPONENTS / ENDS) + (EXPONENTS - 1) * inside
    chances = np.exp(likelihood - likelihood.max()) * PRIOR
    found: Floats = chances / chances.sum()
    return found
