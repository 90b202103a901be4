"""Rungs on Ray Tune: a trial that is to wait at one is stopped, and submitted again to go on."""

from __future__ import annotations

from typing import Any, cast

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from gptray.jobs.tune.task import TrialTask
from gptray.record import MetricsRow
from gptray.tuning.halving import Halving


def task_of(trial: Any) -> TrialTask:
    """What one of Tune's trials was given."""
    task = trial.config["task"]
    assert isinstance(task, TrialTask)
    return task


def name_of(trial: Any) -> str:
    """The name in the sweep of one of Tune's trials."""
    return task_of(trial).name


class Rungs(FIFOScheduler):  # type: ignore[misc]
    """Stops trials that are to wait.

    Tune's own pause keeps a trial among those that `max_concurrent_trials` counts, and its process
    where no other trial wants it. A trial resumes from its run folder anyway.
    """

    def __init__(self, halving: Halving) -> None:
        super().__init__()
        self._halving = halving

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        task = task_of(trial)
        # The last report has an outcome in the place of a step.
        if not task.is_cut or "step" not in result:
            return str(TrialScheduler.CONTINUE)
        most = task.run.config.train.max_steps
        goes_on = self._halving.goes_on(task.name, cast(MetricsRow, result), max_steps=most)
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)
