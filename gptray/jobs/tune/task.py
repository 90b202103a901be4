"""What the process of a trial is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptray.jobs.train.task import TrainTask


@dataclass(frozen=True)
class TrialTask:
    """A trial and the run that it trains.

    is_cut: whether rungs may cut it. reserved: what each of its workers has.
    """

    name: str
    run: TrainTask
    is_cut: bool
    reserved: Mapping[str, float]
