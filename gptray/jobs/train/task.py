"""What a training process and a trial are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gptray.config import Config
from gptray.data.tokens import TokenData
from gptray.jobs.folders.origin import Origin
from gptray.storage.record import write_event


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


@dataclass(frozen=True)
class TrialTask:
    """A trial and the run that it trains.

    is_cut: whether it may be stopped at rungs. reserved: each worker's resources.
    """

    name: str
    run: TrainTask
    is_cut: bool
    reserved: Mapping[str, float]
