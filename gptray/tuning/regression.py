"""Bayesian regression of trials' measurements on their settings, stage by stage.

It is for more settings than a few trials can tell apart: most are assumed to do next to nothing
until the trials say otherwise. It knows matrices, and nothing of sweeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Places = NDArray[np.intp]

CHAINS = 32
BURN_IN = 40
KEPT = 32
# Prior mean and standard deviation of r, the part of a trial's deviation that persists to the next
# stage.
PERSISTENCE, UNSURE = 0.5, 0.5
# A setting's effect is at most about this many standard deviations of the trials' gains in a stage.
WIDEST = 3.0
# Degrees of freedom of Student's t: how far off single trials may be.
TAILS = 4.0
FLAT = 1e-6  # the precision of an uninformative prior
# Bounds of squared scales, for numerical stability: beyond them, results no longer change.
LEAST, MOST = 1e-6, 1e6


@dataclass(frozen=True)
class Stage:
    """The measurements at one step.

    reached: (trials,), which trials got there; they all reached the previous stage too.
    values: (trials, outcomes), arbitrary for trials that did not.
    """

    reached: Flags
    values: Floats


def sample_effects(
    design: Floats, group: Places, stages: Sequence[Stage], *, seed: int
) -> list[Floats]:
    """Draw each column's effect on each outcome, at each stage, from the posterior.

    design: (trials, columns). group: (columns,), the setting that a column belongs to, from 0.
    Returns an array (draws, columns, outcomes) for each stage.

    At the first stage y = a + X b + e. At each later one, for the trials that reached it,
    y' = a' + X (b + d) + r e + e', where e is the trial's residual at the previous stage, r is
    roughly between 0 and 1, and `b + d` is returned. Which trials continue depends only on the
    measurements at the previous stage, so that given these the others are missing at random (Little
    & Rubin 2002, section 7.4), and stopping them causes no bias. An outcome's e' also depends on
    the e of the outcomes before it.

    e and e' have Student's t distribution, so that outliers count for little. b and d have a group
    horseshoe prior: a scale for each setting, the same at all stages, times one for each stage,
    both half-Cauchy (Carvalho et al. 2010). Sampled by Gibbs sampling with auxiliary variables
    (Makalic & Schmidt 2016), each stage given the draw at the previous one.
    """
    samplers = [
        _Sampler(design, group, stages, outcome, np.random.default_rng([seed, outcome]))
        for outcome in range(stages[0].values.shape[1])
    ]
    draws: list[list[Floats]] = [[] for _ in stages]
    for turn in range(BURN_IN + KEPT):
        # Trials' deviations at each stage, by outcome so far: (chains, trials that reached it).
        deviations: list[list[Floats]] = [[] for _ in stages]
        for sampler in samplers:
            sampler.draw(deviations)
        if turn >= BURN_IN:
            for number, found in enumerate(draws):
                found.append(np.stack([one.effects[number] for one in samplers], axis=-1))
    return [np.concatenate(found) for found in draws]


@dataclass(frozen=True)
class _Data:
    """One outcome at one stage, for the trials that reached it.

    design: (trials, columns + 1), the last column constant. values: (trials,), centred.
    spread: the standard deviation of the trials' gains since the previous stage.
    kept: which trials of the previous stage these are.
    """

    design: Floats
    values: Floats
    spread: float
    kept: Flags


class _Sampler:
    """The Markov chains of one outcome, in parallel. All scales are squared.

    `local` (chains, settings), `overall` and `noise` (chains, stages) each have an auxiliary
    variable of the same shape.
    """

    def __init__(
        self,
        design: Floats,
        group: Places,
        stages: Sequence[Stage],
        outcome: int,
        rng: np.random.Generator,
    ) -> None:
        self._rng, self._group = rng, group
        self._data = _prepared(design, stages, outcome)
        self._member = np.eye(int(group.max()) + 1)[group]  # (columns, settings)
        self._local, self._local_aid = np.ones((2, CHAINS, self._member.shape[1]))
        self._overall, self._noise = np.full((2, CHAINS, len(stages)), 0.2)
        self._overall_aid, self._noise_aid = np.ones((2, CHAINS, len(stages)))
        # The weight of each trial in each chain, by stage: (chains, trials).
        self._weights = [np.ones((CHAINS, len(data.values))) for data in self._data]
        self.effects: list[Floats] = []

    def draw(self, deviations: list[list[Floats]]) -> None:
        """Do one Gibbs sweep; `effects` then has an array (chains, columns) for each stage."""
        effects = np.zeros((CHAINS, len(self._group)))
        squares = np.empty((len(self._data), CHAINS, self._member.shape[1]))
        self.effects = []
        for number, data in enumerate(self._data):
            before = [one[:, data.kept] for one in deviations[number - 1]] if number else []
            before = [one - one.mean(1, keepdims=True) for one in before]
            target = data.values - effects @ data.design[:, :-1].T
            if before:
                target = target - PERSISTENCE * before[-1]  # the last is this outcome's own
            added = self._coefficients(number, data, target, before)
            effects = effects + added * data.spread
            squares[number] = added**2 @ self._member
            self.effects.append(effects)
            deviations[number].append(data.values - effects @ data.design[:, :-1].T)
        self._draw_scales(squares)

    def _coefficients(
        self, number: int, data: _Data, target: Floats, before: Sequence[Floats]
    ) -> Floats:
        """Draw what the columns add at a stage, (chains, columns), in units of its spread."""
        columns, noise = len(self._group), self._noise[:, number, None]
        fixed = np.broadcast_to(data.design, (CHAINS, *data.design.shape))
        regressors = np.concatenate([fixed, *(one[:, :, None] / data.spread for one in before)], 2)
        target = target / data.spread
        prior = np.full((CHAINS, regressors.shape[2]), UNSURE**-2.0)
        scales = self._local[:, self._group] * self._overall[:, number, None]
        prior[:, :columns] = 1 / scales + WIDEST**-2.0
        prior[:, columns] = FLAT
        # Draw from the normal posterior by perturbing the data (Papandreou & Yuille 2010).
        weights = self._weights[number] / noise
        across = regressors.transpose(0, 2, 1) * weights[:, None]
        precision = across @ regressors + prior[:, :, None] * np.eye(prior.shape[1])
        perturbed = target + self._rng.standard_normal(target.shape) / np.sqrt(weights)
        right = (across @ perturbed[:, :, None])[:, :, 0]
        right += np.sqrt(prior) * self._rng.standard_normal(prior.shape)
        found: Floats = np.linalg.solve(precision, right[:, :, None])
        self._draw_noise(number, target - (regressors @ found)[:, :, 0])
        return found[:, :columns, 0]

    def _draw_noise(self, number: int, rest: Floats) -> None:
        """Draw the noise scale and the trials' weights, given residuals (chains, trials)."""
        rate = (self._weights[number] * rest**2).sum(1) / 2 + 1 / self._noise_aid[:, number]
        noise = self._inverse_gamma((rest.shape[1] + 1) / 2, rate)
        self._noise[:, number] = noise
        self._noise_aid[:, number] = self._inverse_gamma(1.0, 1 + 1 / noise)
        rate = (TAILS + rest**2 / noise[:, None]) / 2
        self._weights[number] = 1 / self._inverse_gamma((TAILS + 1) / 2, rate)

    def _draw_scales(self, squares: Floats) -> None:
        """Draw the scales, given sums of squared coefficients (stages, chains, settings)."""
        sizes, columns = self._member.sum(0), len(self._group)
        at_stage = self._overall.T[:, :, None]
        rate = (squares / at_stage).sum(0) / 2 + 1 / self._local_aid
        self._local = self._inverse_gamma((sizes * len(squares) + 1) / 2, rate)
        self._local_aid = self._inverse_gamma(1.0, 1 + 1 / self._local)
        rate = (squares / self._local).sum(2).T / 2 + 1 / self._overall_aid
        self._overall = self._inverse_gamma((columns + 1) / 2, rate)
        self._overall_aid = self._inverse_gamma(1.0, 1 + 1 / self._overall)

    def _inverse_gamma(self, shape: float | Floats, rate: Floats) -> Floats:
        drawn: Floats = np.clip(rate / self._rng.gamma(shape, size=rate.shape), LEAST, MOST)
        return drawn


def _prepared(design: Floats, stages: Sequence[Stage], outcome: int) -> list[_Data]:
    found = []
    before: Stage | None = None
    for stage in stages:
        values = stage.values[stage.reached, outcome]
        gained = values - before.values[stage.reached, outcome] if before else values
        constant = np.ones((len(values), 1))
        found.append(
            _Data(
                design=np.concatenate([design[stage.reached], constant], 1),
                values=values - values.mean(),
                spread=float(gained.std()) or 1.0,
                kept=stage.reached[before.reached] if before else stage.reached[stage.reached],
            )
        )
        before = stage
    return found
