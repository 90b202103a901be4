"""The entry points of training's processes.

Each process imports only what it runs: importing torch takes seconds, which the driver and the
controller need not spend, and the driver's modules take time that workers need not spend.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.train import Checkpoint

from gptray.jobs.train.task import TrainTask


def begin_worker(given: dict[str, Any]) -> dict[str, Any]:
    """A Ray Train worker: calls `train_worker(**given)`."""
    train_worker, _ = _run_by_workers()
    return train_worker(**given)


def begin_validation(checkpoint: Checkpoint, *, task: TrainTask) -> dict[str, Any]:
    """A Ray task that scores a checkpoint: calls `validate`."""
    _, validate = _run_by_workers()
    return validate(Path(checkpoint.path), task)


def _run_by_workers() -> tuple[Callable[..., dict[str, Any]], Callable[..., dict[str, Any]]]:
    """`train_worker` and `validate`, imported late because they import torch."""
    from gptray.jobs.train import validate, worker

    return worker.train_worker, validate.validate
