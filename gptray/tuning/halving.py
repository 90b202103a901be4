"""Successive halving by promotion: decides which trials wait at a rung and which continue.

It is ASHA as published (Li et al. 2018, arXiv 1810.05934, algorithm 2): a trial waits at each rung
until it is among the best 1 in `reduction_factor` of the trials that have reached it, which may be
at once or after others arrive. It depends only on the trials' measurements, so it survives a kill.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np

from gptray.config import Config
from gptray.storage.record import MetricsRow
from gptray.tuning.sweep_record import Trial, rungs


@dataclass
class _Rung:
    """A step at which trials are compared. By trial: when it arrived, and its score then."""

    step: int
    arrived: dict[str, int] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)

    def promotable(self, one_in: int, *, at_least: int = 0) -> list[str]:
        """The best trials at this rung that have not left it yet."""
        number = max(at_least, len(self.scores) // one_in)
        order = sorted(self.scores, key=lambda name: (self.scores[name], name))
        return [name for name in order[:number] if name not in self.left]


class Halving:
    """A sweep's rungs, filled as its trials report."""

    def __init__(self, config: Config, past: Iterable[Trial] = ()) -> None:
        """past: trials that have run, with their rows; repetitions are not compared."""
        self._seed, self._one_in = config.seed, config.tune.reduction_factor
        steps = rungs(config)
        number = min(config.tune.brackets, max(1, len(steps)))
        # A later bracket leaves out the first rungs.
        self._brackets = [[_Rung(step) for step in steps[first:]] for first in range(number)]
        for trial in past:
            if trial.replicate_of is None:
                for row in trial.rows:
                    self._take_in(trial.name, row, max_steps=trial.max_steps)
                self.ended(trial.name, trial.outcome)

    def continues(self, name: str, row: MetricsRow, *, max_steps: int) -> bool:
        """Take in a row that a trial reports; return whether it continues rather than waits."""
        self._take_in(name, row, max_steps=max_steps)
        for rung in self._rungs_of(name):
            if name in rung.promotable(self._one_in):
                rung.left.add(name)
        return not self.waits(name)

    def ended(self, name: str, outcome: str | None) -> None:
        """Take in how a trial ended; if it went wrong, it gives up its place at each rung."""
        reached = [rung for rung in self._rungs_of(name) if name in rung.arrived]
        if outcome in ("diverged", "failed"):
            for rung in reached:
                rung.scores[name] = math.inf
        elif outcome == "stopped" and reached:
            # With several workers, a trial may pass the rung before it is stopped.
            reached[-1].left.discard(name)

    def waits(self, name: str) -> bool:
        """Whether a trial has reached a rung and not left it."""
        return any(name in rung.arrived and name not in rung.left for rung in self._rungs_of(name))

    def promote(self, waiting: Collection[str], *, last: bool = False) -> str | None:
        """Pick the waiting trial to continue, from the highest rung; None if none may.

        last: no more trials will arrive, so the best of each rung continues, however few there are.
        """
        found = [rung for bracket in self._brackets for rung in bracket]
        for rung in sorted(found, key=lambda rung: -rung.step):
            for name in rung.promotable(self._one_in, at_least=int(last)):
                if name in waiting:
                    rung.left.add(name)
                    return name
        return None

    def _take_in(self, name: str, row: MetricsRow, *, max_steps: int) -> None:
        """Take in a row, except a landing's scores: other trials at a rung have not cooled down."""
        step, is_compared = row["step"], row.get("phase") != "landing" and "val_bpb" in row
        reached = [rung for rung in self._rungs_of(name) if rung.step <= step]
        if is_compared and reached and name not in reached[-1].arrived:
            reached[-1].arrived[name], reached[-1].scores[name] = step, row["val_bpb"]
        for rung in reached:
            if step >= max_steps or step > rung.arrived.get(name, step):
                rung.left.add(name)

    def _rungs_of(self, name: str) -> list[_Rung]:
        """The rungs of a trial's bracket, a fixed random one; longer brackets get more trials."""
        chances = np.exp([float(len(bracket)) for bracket in self._brackets])
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        return self._brackets[rng.choice(len(chances), p=chances / chances.sum())]
