"""The gap of a report: validation loss minus training loss, dropout off in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from gptray.config import Config
from gptray.evaluation.model_commands import home_of, model_commands
from gptray.evaluation.result import Evaluation
from gptray.record import Event
from gptray.reports.run.diagnosis import Diagnosis

MEANS = "validation loss - training loss, dropout off in both; it grows as a model overfits"


@dataclass(frozen=True)
class Gap:
    """The gap of a run's best model, and how it was measured.

    train_loss: on a sample of the training split, dropout off. None: not measured, as `how` says.
    """

    value: float | None
    train_loss: float | None
    how: str


def gap_of(
    folder: Path, config: Config, diagnosis: Diagnosis, evaluation: Evaluation | None
) -> Gap:
    """The gap from an evaluation, or from training if that has no dropout."""
    if evaluation and evaluation["gap"] is not None:
        train = evaluation["splits"]["train"]
        assert train
        return Gap(evaluation["gap"], train["loss"], f"{MEANS}; measured by jobs/evaluate.py")
    best = diagnosis.chosen
    if best and config.model.dropout == 0:
        return Gap(best.gap, None, f"{MEANS}; of the batches before that step")
    missing = "not measured: training has dropout on"
    command = model_commands(folder, home_of(config))["evaluate"]
    return Gap(None, None, f"{MEANS}; {missing}; {command} measures it")


def is_stale(evaluation: Evaluation, events: Sequence[Event]) -> bool:
    """Whether the run has found a better model since it was evaluated."""
    found = [event["time"] for event in events if event["event"] == "evaluated" and event["best"]]
    return bool(found) and found[-1] > datetime.fromisoformat(evaluation["time"]).timestamp() + 1
