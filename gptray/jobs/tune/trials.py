"""Runs a queue's trials on Ray Tune, stops them at rungs, and reports their ends to the queue.

Tune's own state is pickled, so it is never loaded: each start is a new experiment, with the
remaining trials, in a scratch folder. To Tune, a trial promoted from a rung is also a new one.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from gptray.config import Config, RunFailed
from gptray.jobs.cluster.ray_messages import why_ended
from gptray.jobs.train.task import TrialTask
from gptray.jobs.tune.queue import SweepQueue
from gptray.storage.files import storing
from gptray.storage.record import MetricsRow
from gptray.tuning.halving import Halving

TUNE_ENV = {
    # Runs write their own metrics.jsonl and TensorBoard files.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A trial's last report has its outcome but no metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_WARN_THRESHOLD_S": "60",
    # The newer output prints a table of the experiment whatever the verbosity.
    "RAY_AIR_NEW_OUTPUT": "0",
}
SCRATCH = ".ray"


def run_trials(config: Config, folder: Path, queue: SweepQueue) -> None:
    """Run the queue's trials, `at_once` at a time, each worker with the `reserved` resources.

    If the queue raises RunFailed, this sets its `failure` and stops all trials.
    """
    for key, value in TUNE_ENV.items():
        os.environ.setdefault(key, value)
    is_here = config.compute.num_workers == 1
    # A trial of several workers only waits for them, but Tune refuses trials without resources.
    bundle = queue.reserved if is_here else {"memory": 64.0 * 2**20}
    labels = [config.compute.selector] if config.compute.selector else None
    resources = ray.tune.PlacementGroupFactory([bundle], bundle_label_selector=labels)
    with storing(folder), _scratch(folder) as scratch, _quiet():
        ray.tune.Tuner(
            ray.tune.with_resources(_run_trial, resources),
            tune_config=ray.tune.TuneConfig(
                num_samples=-1,
                max_concurrent_trials=queue.at_once,
                search_alg=_Searcher(queue),
                scheduler=Rungs(queue.halving),
                # If a trial is stopped, its workers end with the actor that waits for them.
                reuse_actors=is_here,
                trial_name_creator=name_of,
                trial_dirname_creator=name_of,
            ),
            run_config=ray.tune.RunConfig(
                name=scratch.name,
                storage_path=str(folder),
                verbose=0,
                callbacks=[_Log(queue)],
                stop=_Brake(queue),
                failure_config=ray.tune.FailureConfig(max_failures=config.compute.max_failures),
            ),
        ).fit()


# Importing torch takes seconds, so only a trial's process does it, not the driver.
def _run_trial(given: dict[str, TrialTask]) -> dict[str, Any]:
    from gptray.jobs.tune.worker import run_trial

    return run_trial(given["task"])


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder for Tune's own files, which is removed afterwards."""
    scratch = folder / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Tune's own output, unless --verbose asks for it."""
    ours, logger = logging.getLogger("gptray"), logging.getLogger("ray.tune")
    level = logger.level
    if not ours.isEnabledFor(logging.DEBUG):
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class _QueueUser:
    """Base of the objects that Tune calls in the driver; pickled by Tune, they become empty."""

    def __init__(self, queue: SweepQueue) -> None:
        super().__init__()
        self._queue = queue

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


class _Searcher(_QueueUser, Searcher):  # type: ignore[misc]
    """Gives Tune the queue's trials in order."""

    def set_search_properties(self, *args: object, **spec: object) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, TrialTask] | str | None:
        with _failure_kept(self._queue):
            if planned := self._queue.next():
                return {"task": self._queue.task(planned)}
        is_over = self._queue.is_over or self._queue.failure
        return str(Searcher.FINISHED) if is_over else None

    def on_trial_complete(self, trial_id: str, *args: object, **info: object) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass


@contextmanager
def _failure_kept(queue: SweepQueue) -> Iterator[None]:
    """Store a RunFailed in the queue, since Tune would take it for a failure of the trial."""
    try:
        yield
    except RunFailed as error:
        queue.failure = queue.failure or error


class _Brake(_QueueUser, ray.tune.Stopper):  # type: ignore[misc]
    """Stops all trials once the sweep's record cannot be written."""

    def __call__(self, trial_id: str, result: object) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._queue.failure is not None


class _Log(_QueueUser, ray.tune.Callback):  # type: ignore[misc]
    """Records the outcome of each trial."""

    def on_trial_start(self, iteration: int, trials: object, trial: Trial, **info: object) -> None:
        with _failure_kept(self._queue):
            self._queue.started(name_of(trial))

    def on_trial_complete(
        self, iteration: int, trials: object, trial: Trial, **info: object
    ) -> None:
        if self._queue.failure:
            return  # stopped because of it
        result = trial.last_result
        # Without an outcome, the scheduler ended the trial.
        outcome = result.get("outcome", "stopped")
        step = result.get("last_step", result.get("step", 0))
        with _failure_kept(self._queue):
            self._queue.ended(
                name_of(trial),
                outcome,
                step=step,
                message=result.get("message"),
                passing=result.get("passing", False),
            )

    def on_trial_error(self, iteration: int, trials: object, trial: Trial, **info: object) -> None:
        is_told = trial.error_file and Path(trial.error_file).is_file()
        message = why_ended(Path(trial.error_file).read_text("utf-8") if is_told else "")
        with _failure_kept(self._queue):
            self._queue.ended(name_of(trial), "failed", step=0, message=message, passing=True)


def task_of(trial: Trial) -> TrialTask:
    """The task of one of Tune's trials."""
    task = trial.config["task"]
    assert isinstance(task, TrialTask)
    return task


def name_of(trial: Trial) -> str:
    """The sweep's name for one of Tune's trials."""
    return task_of(trial).name


class Rungs(FIFOScheduler):  # type: ignore[misc]
    """Stops trials that are to wait at a rung.

    Tune's own pause still counts a trial towards `max_concurrent_trials`, and keeps its process if
    no other trial needs it. A stopped trial can resume from its run folder anyway.
    """

    def __init__(self, halving: Halving) -> None:
        super().__init__()
        self._halving = halving

    def on_trial_result(
        self, tune_controller: object, trial: Trial, result: dict[str, object]
    ) -> str:
        task = task_of(trial)
        # The last report has an outcome instead of a step.
        if not task.is_cut or "step" not in result:
            return str(TrialScheduler.CONTINUE)
        most = task.run.config.train.max_steps
        continues = self._halving.continues(task.name, cast(MetricsRow, result), max_steps=most)
        return str(TrialScheduler.CONTINUE if continues else TrialScheduler.STOP)
