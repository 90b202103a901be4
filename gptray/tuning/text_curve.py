"""The value of text: validation loss as a function of the share of the text trained on.

It knows the losses of runs that differ in their share of the text and in their seed, and nothing of
sweeps. Intervals are 95% credible intervals over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from gptray.tuning.effects import TAILS, Interval
from gptray.tuning.regression import Floats

# The fewest shares of the text, and the fewest runs with each, to fit a curve.
ENOUGH_SHARES, ENOUGH_SEEDS = 3, 2
# The prior probability of the straight line; the other exponents share the rest.
STRAIGHT = 0.5
EXPONENTS = np.linspace(0.0, 2.0, 41)
STRAIGHTEST = 1e-9  # an exponent with which the power law is practically a line
DRAWS = 4000

Losses = Mapping[float, Sequence[float]]


class TextCurve:
    """Posterior draws of the curve of loss over the share of the text.

    loss(s) = end + drop g(s), where g falls from 1 at the smallest share to 0 at the largest like
    (s^-a - 1) / a: a power law with a floor (Hestness et al. 2017, Hoffmann et al. 2022) or, for
    a = 0, a straight line in log s. Half of the prior is on the line, the rest is spread over
    `EXPONENTS`; it is flat on end, drop and the logarithm of the runs' standard deviation.

    shares: ascending. exponents, ends, drops, deviations (of a single run): (draws,).
    """

    def __init__(self, losses: Losses, *, seed: int = 0) -> None:
        """Fit the curve to the losses of three or more shares, with two or more runs each."""
        self.shares = shares = sorted(losses)
        assert len(shares) >= ENOUGH_SHARES
        runs = [(share, loss) for share in shares for loss in losses[share]]
        x, y = np.array(runs).T
        freedom = len(runs) - 2
        design = np.stack([_ramp(x, EXPONENTS, shares), np.ones((len(EXPONENTS), len(x)))], axis=2)
        across = design.transpose(0, 2, 1) @ design  # (exponents, 2, 2)
        found = np.linalg.solve(across, design.transpose(0, 2, 1) @ y[:, None])[:, :, 0]
        rest = ((y - (design @ found[:, :, None])[:, :, 0]) ** 2).sum(1)
        rest = np.maximum(rest, 1e-12 * y.var() + 1e-18)  # runs may agree to the last digit
        prior = np.full(len(EXPONENTS), (1 - STRAIGHT) / (len(EXPONENTS) - 1))
        prior[0] = STRAIGHT
        # The likelihood with end, drop and the deviation integrated out.
        fit = np.log(prior) - np.linalg.slogdet(across)[1] / 2 - freedom / 2 * np.log(rest)
        weights = np.exp(fit - fit.max())
        rng = np.random.default_rng(seed)
        drawn = rng.choice(len(EXPONENTS), DRAWS, p=weights / weights.sum())
        self.exponents = EXPONENTS[drawn]
        self.deviations = np.sqrt(rest[drawn] / rng.chisquare(freedom, DRAWS))
        spread = np.linalg.cholesky(np.linalg.inv(across))[drawn]
        noise = (spread @ rng.standard_normal((DRAWS, 2, 1)))[:, :, 0] * self.deviations[:, None]
        self.drops, self.ends = (found[drawn] + noise).T

    @property
    def fall(self) -> Interval:
        """The fall of the loss from the smallest share to the largest."""
        return _interval(self.drops)

    @property
    def is_straight(self) -> bool:
        """Whether the runs support the line in log s at least as well as power laws."""
        return bool((self.exponents == 0).mean() >= STRAIGHT)

    @property
    def floor(self) -> Interval:
        """The loss in the limit of infinite text, according to the power laws alone."""
        is_law = self.exponents > 0
        ratio = (self.shares[0] / self.shares[-1]) ** -self.exponents[is_law]
        floors = self.ends[is_law] - self.drops[is_law] / (ratio - 1)
        return _interval(np.maximum(floors, 0))  # no loss is below 0

    def at(self, share: float) -> Interval:
        """The mean loss of runs with a share of the text, which may exceed 1."""
        ramp = _ramp(np.array([share]), self.exponents, self.shares)[:, 0]
        return _interval(np.maximum(self.ends + self.drops * ramp, 0))

    def needed(self, losses: Sequence[float], *, seed: int = 0) -> Interval:
        """The share of the text with which the curve reaches the mean of these losses.

        It is clipped to the range of `shares`, so a result at either end is only a bound.
        """
        rng = np.random.default_rng(seed)
        noise = self.deviations / len(losses) ** 0.5 * rng.standard_normal(DRAWS)
        ramp = (fmean(losses) + noise - self.ends) / np.maximum(self.drops, 1e-12)
        a = np.maximum(self.exponents, STRAIGHTEST)
        steepest = np.expm1(a * np.log(self.shares[-1] / self.shares[0]))
        logs = np.log1p(np.clip(ramp, 0, 1) * steepest) / a
        return _interval(self.shares[-1] * np.exp(-logs))


def _ramp(share: Floats, exponents: Floats, shares: Sequence[float]) -> Floats:
    """g(share) for each exponent: (exponents, shares)."""
    logs = -np.log(np.array([*share, shares[0]]) / shares[-1])
    bent = np.expm1(np.maximum(exponents, STRAIGHTEST)[:, None] * logs)
    ramp: Floats = bent[:, :-1] / bent[:, -1:]
    return ramp


def _interval(draws: Floats) -> Interval:
    middle, low, high = np.quantile(draws, (0.5, *TAILS)).tolist()
    return Interval(low, middle, high)
