"""Replay a sweep with rungs on the full curves of its trials, in any order of arrival."""

from __future__ import annotations

import heapq
import random
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tune_grid import Curve

from gptray.config import Config
from gptray.tuning.halving import Halving
from gptray.tuning.sweep_record import Trial, rungs
from gptray.tuning.trial_plan import score

# A winner counts as close if its loss is at most this share above the best.
CLOSE = 0.005


@dataclass(frozen=True)
class Outcome:
    """A sweep's steps as a share of the grid's, and its winner's rank and distance in the grid."""

    share: float
    rank: int
    behind: float


def replay(
    config: Config, curves: Sequence[Curve], order: Iterable[str], *, at_once: int = 2
) -> Outcome:
    """Decide as `gptray.jobs.tune.queue` does, with trials in this order, `at_once` at a time."""
    by_name = {curve.trial.name: curve for curve in curves}
    halving, waiting, stopped = Halving(config), deque(order), set[str]()
    taken = dict.fromkeys(by_name, 0)  # evaluations made
    running: list[tuple[float, str]] = []
    clock = 0.0

    def next_trial() -> str | None:
        name = halving.promote(stopped)
        if name is None and waiting:
            return waiting.popleft()
        if name is None and not running:
            name = halving.promote(stopped, last=True)
        stopped.discard(name or "")
        return name

    def run_on(name: str) -> None:
        curve = by_name[name]
        heapq.heappush(running, (clock + curve.seconds / len(curve.trial.rows), name))

    while True:
        while len(running) < at_once and (name := next_trial()):
            run_on(name)
        if not running:
            return _outcome(by_name, taken)
        clock, name = heapq.heappop(running)
        trial = by_name[name].trial
        taken[name] += 1
        continues = halving.continues(name, trial.rows[taken[name] - 1], max_steps=trial.max_steps)
        if taken[name] == len(trial.rows):
            halving.ended(name, trial.outcome)
        elif continues:
            run_on(name)
        else:
            halving.ended(name, "stopped")
            stopped.add(name)


def _outcome(curves: Mapping[str, Curve], taken: Mapping[str, int]) -> Outcome:
    steps = sum(curve.trial.rows[taken[name] - 1]["step"] for name, curve in curves.items())
    lowest = {
        name: min(row["val_bpb"] for row in curve.trial.rows[: taken[name]])
        for name, curve in curves.items()
    }
    best, *_ = ranking = sorted(score(curve.trial) for curve in curves.values())
    won = min(lowest.values())
    return Outcome(
        share=steps / sum(curve.trial.step for curve in curves.values()),
        rank=1 + sum(one < won for one in ranking),
        behind=won / best - 1,
    )


def rank_correlation(trials: Iterable[Trial], rung: int) -> float:
    """Spearman's correlation of trials' losses at a rung and their final scores, assuming no ties.

    Only of trials that reached the rung before any cool-down, as rungs compare only these.
    """
    there = {
        trial.name: (next(row["val_bpb"] for row in stable if row["step"] >= rung), score(trial))
        for trial in trials
        if (stable := [row for row in trial.rows if row.get("phase") != "landing"])
        and stable[-1]["step"] >= rung
    }
    ranks = [
        np.argsort(np.argsort(values)).tolist() for values in zip(*there.values(), strict=True)
    ]
    return statistics.correlation(*ranks)


def figures(config: Config, curves: Sequence[Curve], *, orders: int) -> dict[str, object]:
    """How a sweep of this config does on these curves.

    share, rank, behind: in the order in which the seed draws the trials. shares: the least, mean
    and most in random orders; close: the share of these whose winner is within CLOSE of the best.
    """
    names = [curve.trial.name for curve in curves]
    own = replay(config, curves, names)
    rng = random.Random(0)
    others = [replay(config, curves, rng.sample(names, len(names))) for _ in range(orders)]
    shares = [one.share for one in others]
    return {
        "trials": len(names),
        "rank_correlation": {
            str(rung): round(rank_correlation([curve.trial for curve in curves], rung), 3)
            for rung in rungs(config)
        },
        "share": round(own.share, 3),
        "rank": own.rank,
        "behind": round(own.behind, 5),
        "shares": [round(one, 3) for one in (min(shares), statistics.fmean(shares), max(shares))],
        "close": round(sum(one.behind <= CLOSE for one in others) / len(others), 3),
        "best_val_bpb": round(min(score(curve.trial) for curve in curves), 4),
        "baseline_val_bpb": round(score(curves[0].trial), 4) if config.tune.baseline else None,
    }
