"""Asynchronous validation: a separate process scores each checkpoint while training continues.

Ray Train (ValidationConfig) sends it the checkpoints one at a time, and keeps the results until the
training workers ask for them. `gptray.training.evaluations` decides what a score means and when it
takes effect.
"""

from __future__ import annotations

import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
import torch

from gptray.config import Config, RunFailed
from gptray.data.scoring import Score
from gptray.jobs.cluster.tasks import Failure, attempt
from gptray.jobs.train.node_run import checkpoint_on_node
from gptray.jobs.train.samples import sample_texts
from gptray.jobs.train.task import TrainTask
from gptray.storage.record import try_event
from gptray.training.checkpoint import checkpoint_folder
from gptray.training.evaluations import Validation
from gptray.training.validation import Scores, score_checkpoint

# After waiting this long, training says so.
WAIT_S = 30.0


def validate(checkpoint: Path, task: TrainTask) -> dict[str, object]:
    """Score a checkpoint and sample from it, in a Ray task.

    A failure is also returned, for the training workers to raise: Ray would only log it.
    """
    try:
        outcome = attempt(lambda: _scored(checkpoint, task))
    except Exception:
        outcome = Failure(traceback.format_exc())
    return {"failure": asdict(outcome)} if isinstance(outcome, Failure) else outcome


def _scored(checkpoint: Path, task: TrainTask) -> dict[str, object]:
    config = task.config
    torch.set_num_threads(task.threads)
    device = torch.device("cuda" if config.compute.use_gpu else "cpu")
    with checkpoint_on_node(task, checkpoint.name) as (folder, here):
        data = here.tokens()
        scores, model = score_checkpoint(config, data, folder, device, run_dir=here.run_dir)
    samples = sample_texts(config, data, model)
    return {"scores": asdict(scores), "samples": samples}


def _scores(fields: dict[str, Any]) -> Scores:
    """Restore what `asdict` has taken apart."""
    averaged = fields["averaged"] and Score(**fields["averaged"])
    also = {name: Score(**score) for name, score in fields["also"].items()}
    return Scores(Score(**fields["own"]), averaged, also)


class Validations:
    """The validation results of a run's checkpoints, for a training worker."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        self._run_dir, self._config = run_dir, config
        self._has_told = False

    def wait(self, step: int) -> Validation:
        """Wait until a step's checkpoint, which this worker has reported, is validated.

        Raises RunFailed, or UserError for a mistake in the config, if validation failed.
        """
        results = self._finished(step)
        validated = ray.train.ReportedCheckpointStatus.VALIDATED
        # A previous attempt may have had the same checkpoint validated.
        for result in results:
            if result.status == validated and "scores" in result.metrics:
                return Validation(_scores(result.metrics["scores"]), result.metrics["samples"])
        last = results[-1]
        failure = Failure(**last.metrics.get("failure", {"message": last.status.value}))
        if failure.is_mistake:
            raise failure.error()
        folder = checkpoint_folder(self._run_dir, step)
        raise RunFailed(f"scoring {folder} failed: {failure.message}")

    def _finished(self, step: int) -> list[ray.train.ReportedCheckpoint]:
        """The reports of a step's checkpoint, once none is pending."""
        pending = ray.train.ReportedCheckpointStatus.PENDING_VALIDATION
        name = checkpoint_folder(self._run_dir, step).name
        while True:
            reported = ray.train.get_all_reported_checkpoints(timeout_s=WAIT_S)
            found = [one for one in reported if Path(one.checkpoint.path).name == name]
            if found and not any(one.status == pending for one in found):
                return found
            self._tell(step)

    def _tell(self, step: int) -> None:
        if self._has_told or ray.train.get_context().get_world_rank():
            return
        self._has_told = True
        steps = self._config.train.eval_interval
        # Only on this worker, which must not fail because of a message.
        try_event(
            self._run_dir,
            "waiting",
            message=f"training waits for the score of step {step}: scoring takes longer than "
            f"train.eval_interval={steps} steps, or no worker is free for it",
        )
