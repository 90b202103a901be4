"""How often a sweep that stops itself would have gained more from ten more trials than it said.

  python benchmarks/min_gain.py
  python benchmarks/min_gain.py --sweeps 400 --seed 2

Simulates sweeps with synthetic scores, one trial after another, without rungs and with two (ASHA
with a reduction factor of three; scores at rungs correlate with final ones).
`gptray.tuning.more_trials` judges each sweep after every trial and stops it as soon as it may; then
ten more trials run. Scores are quadratic in 2, 4 or 8 settings, normal, skewed, from a few choices,
or with 8% of trials far ahead of the others, as in sweeps of configs/overfitting_sweep.yaml; all
are spread over 0.01 to 0.5 bits per byte, with noise. Prints a table and, last, one JSON line: how
many sweeps stopped, the share of these that would have gained more, and the median trial count.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gptray.tuning.more_trials import ENOUGH, MORE, Gain

Floats = NDArray[np.float64]
MIN_GAIN, ONE_IN = 0.01, 3
KINDS = ("quadratic 2", "quadratic 4", "quadratic 8", "normal", "skewed", "choices", "rare")


def scores(kind: str, number: int, rng: np.random.Generator) -> Floats:
    """The trials' final scores, in bits per byte."""
    spread, noise = (np.exp(rng.uniform(*np.log(ends))) for ends in ((0.01, 0.5), (5e-4, 8e-3)))
    name, _, dimensions = kind.partition(" ")
    if name == "quadratic":
        shape = (number, int(dimensions))
        worth = rng.dirichlet(np.ones(shape[1])) * shape[1]
        found = (worth * (rng.random(shape) - rng.random(shape[1])) ** 2).sum(1)
    elif name == "normal":
        found = 0.4 * rng.standard_normal(number)
    elif name == "skewed":
        found = np.exp(0.7 * rng.standard_normal(number))
    elif name == "rare":
        found = 0.25 * rng.standard_normal(number) - (rng.random(number) < 0.08)
    else:
        found = sum(rng.choice(levels, number) for levels in ((0, 0.1, 0.3), (0, 0.2, 0.25)))
        found = found + 0.3 * (rng.random(number) - rng.random()) ** 2
    scores: Floats = spread * found + noise * rng.standard_normal(number)
    return scores


def stages(last: Floats, rng: np.random.Generator) -> Floats:
    """Scores at two rungs and at the end, (3, trials), with correlations of 0.65 to 0.99."""
    spread, slope = last.std(), rng.uniform(0.7, 1.4)
    late, early = rng.uniform(0.1, 0.5), rng.uniform(0.2, 1.0)
    second = last + late * spread * rng.standard_normal(len(last)) + spread
    first = slope * (second + early * spread * rng.standard_normal(len(last))) + spread
    return np.stack([first, second, last])


@dataclass
class Sweep:
    """Trials in order; `reached` has each one's last stage with a score."""

    stages: Floats
    reached: list[int] = field(default_factory=list)

    def run(self, trials: int) -> None:
        """Start more trials, one after another, with all promotions before the next."""
        for _ in range(trials):
            self.reached.append(0)
            self._promote(at_least=0)

    def end(self) -> float:
        """The best score if no more trials come; does not change the sweep."""
        whole = Sweep(self.stages, list(self.reached))
        whole._promote(at_least=1)
        return float(whole._lowest().min())

    def gain(self) -> Gain | None:
        whole = np.array(self.reached) == len(self.stages) - 1
        if len(self.reached) < ENOUGH:
            return None
        lowest = self._lowest()
        return Gain.of(lowest[whole].tolist(), float(lowest.min()), draws=len(lowest))

    def _lowest(self) -> Floats:
        number = len(self.reached)
        so_far = np.minimum.accumulate(self.stages[:, :number], 0)
        found: Floats = so_far[self.reached, np.arange(number)]
        return found

    def _promote(self, *, at_least: int) -> None:
        while (name := self._promotable(at_least)) is not None:
            self.reached[name] += 1

    def _promotable(self, at_least: int) -> int | None:
        reached = np.array(self.reached)
        for rung in range(len(self.stages) - 2, -1, -1):
            here = np.flatnonzero(reached >= rung)
            most = max(at_least, len(here) // ONE_IN)
            best = here[np.argsort(self.stages[rung, here], kind="stable")[:most]]
            waiting = best[reached[best] == rung]
            if len(waiting):
                return int(waiting[0])
        return None


def stop(kind: str, trials: int, rng: np.random.Generator, *, rungs: bool) -> tuple[int, float]:
    """Run a sweep until it stops itself; return the number of trials, and the gain of ten more.

    If it does not stop itself, return all trials, and 0.
    """
    last = scores(kind, trials + MORE, rng)
    sweep = Sweep(stages(last, rng) if rungs else last[None])
    for number in range(1, trials):
        sweep.run(1)
        gain = sweep.gain()
        if gain and gain.most < MIN_GAIN:
            before = sweep.end()
            sweep.run(MORE)
            return number, before - sweep.end()
    return trials, 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sweeps", type=int, default=200, help="of each kind")
    parser.add_argument("--trials", type=int, default=120, help="at most, in a sweep")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    found = []
    print(f"{'scores':12} {'rungs':>5} {'stopped':>8} {'gained more':>12} {'median trials':>14}")
    for rungs in (False, True):
        for kind in KINDS:
            rng = np.random.default_rng([given.seed, KINDS.index(kind), rungs])
            ends = [stop(kind, given.trials, rng, rungs=rungs) for _ in range(given.sweeps)]
            gains = [gain for number, gain in ends if number < given.trials]
            row = {
                "scores": kind,
                "rungs": rungs,
                "sweeps": given.sweeps,
                "stopped": len(gains),
                "gained_more": sum(gain > MIN_GAIN for gain in gains),
                "median_trials": statistics.median(number for number, _ in ends),
            }
            found.append(row)
            share = f"{row['gained_more'] / max(1, len(gains)):.1%}"
            print(
                f"{kind:12} {'yes' if rungs else 'no':>5} {len(gains) / given.sweeps:8.0%} "
                f"{share:>12} {row['median_trials']:14.0f}",
                flush=True,
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
