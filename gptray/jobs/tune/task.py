"""What the process of a trial is given."""

from __future__ import annotations

from dataclasses import dataclass

from gptray.jobs.train.task import TrainTask


@dataclass(frozen=True)
class TrialTask:
    """A trial and the run that it trains. is_cut: whether rungs may cut it."""

    name: str
    run: TrainTask
    is_cut: bool
