"""The input of a training process, and its entry points.

Each process imports only what it runs: importing torch takes seconds, which the driver and the
controller need not spend, and the driver's modules take time that workers need not spend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptray.config import Config
from gptray.data.tokens import TokenData
from gptray.jobs.folders.origin import Origin
from gptray.record import write_event

if TYPE_CHECKING:
    import ray.train


@dataclass(frozen=True)
class TrainTask:
    """A run to train, in `run_dir`, on the tokens in `data_dir`, with `threads` per worker.

    config: checked and resolved by the driver. may_lose_nodes: whether the cluster is not the job's
    own. origin: where workers on other nodes find the driver's folders; None if all nodes see them.
    also: tokens of the texts of evaluate.also, by name.
    """

    config: Config
    data_dir: Path
    run_dir: Path
    threads: int
    may_lose_nodes: bool = False
    origin: Origin | None = None
    also: Mapping[str, Path] = field(default_factory=dict)

    def tokens(self) -> TokenData:
        """The run's tokens. Raises DamagedData."""
        return TokenData.open(self.data_dir, also=self.also)

    @property
    def folder_here(self) -> Path:
        """This node's folder for the run; `run_dir` if all nodes see it."""
        return self.origin.folder_here(self.run_dir) if self.origin else self.run_dir

    def note(self, event: str, **fields: object) -> None:
        """Write an event of the run, from any node. Raises RunFailed."""
        if self.origin is None or self.origin.is_here:
            write_event(self.run_dir, event, **fields)
        else:
            self.origin.call("note", self.origin.name_of(self.run_dir), event, fields)


def begin_worker(given: dict[str, Any]) -> dict[str, Any]:
    """A Ray Train worker: calls `train_worker(**given)`."""
    train_worker, _ = _run_by_workers()
    return train_worker(**given)


def begin_validation(checkpoint: ray.train.Checkpoint, *, task: TrainTask) -> dict[str, Any]:
    """A Ray task that scores a checkpoint: calls `validate`."""
    _, validate = _run_by_workers()
    return validate(Path(checkpoint.path), task)


def _run_by_workers() -> tuple[Callable[..., dict[str, Any]], Callable[..., dict[str, Any]]]:
    """`train_worker` and `validate`, imported late because they import torch."""
    from gptray.jobs.train import validate, worker

    return worker.train_worker, validate.validate


@dataclass(frozen=True)
class TrialTask:
    """A trial and the run that it trains.

    is_cut: whether it may be stopped at rungs. reserved: each worker's resources.
    """

    name: str
    run: TrainTask
    is_cut: bool
    reserved: Mapping[str, float]
