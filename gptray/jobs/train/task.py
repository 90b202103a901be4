"""What a process that trains is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gptray.config import Config


@dataclass(frozen=True)
class TrainTask:
    """A run to train, in `run_dir`, on the tokens in `data_dir`, with so many threads a worker.

    config: checked and resolved by the driver. may_lose_nodes: whether the cluster is not the
    job's own.
    """

    config: Config
    data_dir: Path
    run_dir: Path
    threads: int
    may_lose_nodes: bool = False
