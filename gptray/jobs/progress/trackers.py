"""Experiment trackers that a run can be sent to: MLflow, Weights & Biases, trackio.

Only the packages that a config asks for are imported, when a run is opened.
"""

from __future__ import annotations

import contextvars
import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from gptray.config import TrackConfig, UserError

EXPERIMENT = "gptray"
# killed: stopped from outside, to be resumed later.
Ending = Literal["finished", "failed", "killed"]
_MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
# W&B itself uses 255 for an interrupted run.
_WANDB_EXIT_CODE = {"finished": 0, "failed": 1, "killed": 255}
# The most that one call of MLflow takes.
_MLFLOW_METRICS, _MLFLOW_PARAMS = 1000, 100


@dataclass(frozen=True)
class TrackedRun:
    """A run to send to trackers. group: a trial's sweep.

    ending: how a trial ended; None while it runs, and for a single run.
    """

    folder: Path
    name: str
    settings: Mapping[str, object]
    group: str | None = None
    ending: Ending | None = None


# A step and its metrics.
Point = tuple[int, Mapping[str, float]]


class Session(Protocol):
    """A run in a tracker. `number` is the tracker's id of it."""

    number: str
    # The last step that the tracker has; None if it cannot be asked.
    last: int | None

    def log(self, points: Sequence[Point]) -> None:
        """Add points."""

    def close(self, ending: Ending) -> None:
        """No more points are coming, for now."""


def check_trackers(track: TrackConfig) -> None:
    """Raise UserError, with the pip command, for a tracker whose package is not installed."""
    problems = []
    for name, where in track:
        spec = None if where is None else importlib.util.find_spec(name)
        is_installed = spec is not None and spec.origin is not None  # a folder ./wandb has none
        if where is not None and not is_installed:
            needs = f"needs the package {name}: pip install 'gptray[{name}]'"
            problems.append(f"track.{name}={where} {needs}")
    if problems:
        raise UserError("\n".join(problems))


class _MLflow:
    def __init__(self, where: str, run: TrackedRun, number: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        self._client, self._metric = MlflowClient(tracking_uri=where), Metric
        self.last: int | None = None
        if number is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            number = self._client.create_run(experiment, run_name=run.name).info.run_id
            tags = [RunTag("sweep", run.group)] if run.group else []
            params = [Param(key, str(value)) for key, value in run.settings.items()]
            for first in range(0, len(params), _MLFLOW_PARAMS):
                some = params[first : first + _MLFLOW_PARAMS]
                self._client.log_batch(number, params=some, tags=tags)
        else:
            self._client.update_run(number, status="RUNNING")
            history = self._client.get_metric_history(number, "train_loss")
            self.last = max((one.step for one in history), default=-1)
        self.number = number

    def log(self, points: Sequence[Point]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(key, value, now, step)
            for step, values in points
            for key, value in values.items()
        ]
        for first in range(0, len(metrics), _MLFLOW_METRICS):
            some = metrics[first : first + _MLFLOW_METRICS]
            self._client.log_batch(self.number, metrics=some)

    def close(self, ending: Ending) -> None:
        self._client.set_terminated(self.number, _MLFLOW_STATUS[ending])


class _Wandb:
    def __init__(self, where: str, run: TrackedRun, number: str | None) -> None:
        import wandb

        entity, _, project = where.rpartition("/")
        self._run = wandb.init(
            entity=entity or None,
            project=project,
            name=run.name,
            group=run.group,
            id=number,
            resume="allow" if number else None,
            config=dict(run.settings),
            dir=str(run.folder),
            reinit="create_new",  # the trials of a sweep are sent at the same time
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        # A late score arrives after rows of later steps, but W&B's own step cannot decrease.
        for name in ("val_*", "gap", "also/*"):
            self._run.define_metric(name, step_metric="val_step")
        self.number = self._run.id
        step = self._run.summary.get("_step") if self._run.resumed else None
        self.last = None if step is None else int(step)

    def log(self, points: Sequence[Point]) -> None:
        for step, values in points:
            scored = {"val_step": step} if "val_loss" in values else {}
            is_late = "train_loss" not in values
            self._run.log({**values, **scored}, step=None if is_late else step)

    def close(self, ending: Ending) -> None:
        self._run.finish(exit_code=_WANDB_EXIT_CODE[ending])


class _Trackio:
    def __init__(self, where: str, run: TrackedRun, number: str | None) -> None:
        import trackio

        # In a context of its own, or the next run's start would end this run.
        self._run = contextvars.Context().run(
            trackio.init,
            project=where,
            name=run.name,
            group=run.group,
            config=dict(run.settings),
            resume="allow" if number else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.number = run.name
        self.last: int | None = None

    def log(self, points: Sequence[Point]) -> None:
        for step, values in points:
            self._run.log(dict(values), step=step)

    def close(self, ending: Ending) -> None:
        self._run.finish()  # Trackio does not record how a run ended


_TRACKERS: dict[str, Callable[[str, TrackedRun, str | None], Session]] = {
    "mlflow": _MLflow,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def open_session(tracker: str, where: str, run: TrackedRun, number: str | None) -> Session:
    """Start a run in a tracker, or continue the one with this number."""
    return _TRACKERS[tracker](where, run, number)
