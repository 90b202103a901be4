"""ASHA over a sweep that may have been killed: who is cut at a rung, by all that was measured."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from gptray.config import Config
from gptray.jobs.tune.task import TrialTask
from gptray.tuning.sweep_record import Trial
from gptray.tuning.trial_plan import Planned


def task_of(trial: Any) -> TrialTask:
    """What one of Tune's trials was given."""
    task = trial.config["task"]
    assert isinstance(task, TrialTask)
    return task


def name_of(trial: Any) -> str:
    """The name in the sweep of one of Tune's trials."""
    return task_of(trial).name


class Rungs(ASHAScheduler):  # type: ignore[misc]
    """ASHA that knows what trials have measured before this start.

    Its public methods get the past as if it happened now: every ended trial is added and
    reports its rows, and one that resumes has reported its own before it starts.
    """

    def __init__(self, config: Config, past: Sequence[Trial]) -> None:
        grace = config.tune.grace_period * config.train.eval_interval
        super().__init__(
            time_attr="step",
            metric="val_bpb",
            mode="min",
            # The last rung is below max_steps: there a trial ends by itself, and says how.
            max_t=max(config.train.max_steps - 0.5, grace),
            grace_period=grace,
            reduction_factor=config.tune.reduction_factor,
            brackets=config.tune.brackets,
            stop_last_trials=False,
        )
        self._seed = config.seed
        self._past = {trial.name: trial for trial in past if trial.replicate_of is None}
        for trial in self._past.values():
            if trial.outcome is not None:
                self._add(None, SimpleNamespace(trial_id=trial.name), trial.name)

    def cut_before(self, planned: Planned) -> int | None:
        """The step at which an earlier start was to cut a trial, but ended before it had."""
        past = self._past.get(planned.name)
        if past is None or not past.rows or past.step >= planned.config.train.max_steps:
            return None
        # A trial reports again only if it was not cut, so its last report alone is in doubt.
        rehearsal = SimpleNamespace(trial_id=planned.name)
        decision = copy.deepcopy(self)._add(None, rehearsal, planned.name)
        return past.step if decision == TrialScheduler.STOP else None

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._add(tune_controller, trial, name_of(trial))

    def _add(self, tune_controller: Any, trial: Any, name: str) -> str:
        """Add a trial with what it has reported; return the decision on the last report."""
        # Ray draws the bracket from numpy's global state; a trial is to stay in its own.
        np.random.seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        super().on_trial_add(tune_controller, trial)
        decision = str(TrialScheduler.CONTINUE)
        for row in self._past[name].rows if name in self._past else ():
            decision = super().on_trial_result(tune_controller, trial, row)
        return decision

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        task = task_of(trial)
        if not task.is_cut:
            return str(TrialScheduler.CONTINUE)
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if result.get("step", 0) >= task.run.config.train.max_steps:
            return str(TrialScheduler.CONTINUE)
        return decision
