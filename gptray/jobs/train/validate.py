"""Validation beside the training: a worker of its own scores each checkpoint that is reported.

Ray Train sends it there (ValidationConfig), one checkpoint at a time, and keeps what comes back
until the training workers ask. What a score means, and when it counts, is
`gptray.training.evaluations`'s.
"""

from __future__ import annotations

import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptray.config import Config, RunFailed, UserError
from gptray.data.scoring import Score
from gptray.data.tokens import TokenData
from gptray.jobs.train.samples import sample_texts
from gptray.record import try_event
from gptray.training.checkpoint import checkpoint_folder

if TYPE_CHECKING:
    import ray.train

    from gptray.training.evaluations import Validation

# Training that has waited so long says so.
WAIT_S = 30.0


def validation_config(
    config: Config, settings: dict[str, Any], reserved: dict[str, float]
) -> ray.train.ValidationConfig | None:
    """What Ray Train is to do with a checkpoint, by a worker like those that train; None: nothing.

    settings: as `gptray.jobs.train.run.train_worker` gets them.
    """
    from ray.train import ValidationConfig, ValidationTaskConfig

    if not config.train.async_validation:
        return None
    return ValidationConfig(
        fn=validate,
        task_config=ValidationTaskConfig(fn_kwargs={"settings": settings}),
        ray_remote_kwargs={
            "num_cpus": reserved["CPU"],
            "num_gpus": reserved.get("GPU", 0),
            "max_retries": config.compute.max_failures,
        },
    )


def validate(checkpoint: ray.train.Checkpoint, *, settings: dict[str, Any]) -> dict[str, Any]:
    """Score a checkpoint and sample from it, in a Ray task.

    What goes wrong is a result as well, for the training workers to raise: Ray would only log it.
    """
    try:
        return _validate(Path(checkpoint.path), settings)
    except UserError as error:
        return {"mistake": str(error)}
    except RunFailed as error:
        return {"error": str(error)}
    except Exception:
        return {"error": traceback.format_exc()}


def _validate(checkpoint: Path, settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    from gptray.training.validation import score_checkpoint

    config = Config.model_validate(settings["config"])
    torch.set_num_threads(settings["threads"])
    data = TokenData.open(settings["data_dir"])
    device = torch.device("cuda" if config.compute.use_gpu else "cpu")
    score, model = score_checkpoint(config, data, checkpoint, device)
    return {"score": asdict(score), "samples": sample_texts(config, data, model)}


class Validations:
    """What came of the checkpoints of a run, asked for by a training worker."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        self._run_dir, self._config = run_dir, config
        self._has_told = False

    def wait(self, step: int) -> Validation:
        """Wait for the checkpoint of a step, that this worker has reported, to be validated.

        Raises:
            RunFailed: that failed; says how.
            UserError: it failed by a mistake in the config.
        """
        from ray.train import ReportedCheckpointStatus

        from gptray.training.evaluations import Validation

        results = self._finished(step)
        # A worker that died may have had the same checkpoint validated before.
        for result in results:
            if result.status == ReportedCheckpointStatus.VALIDATED and "score" in result.metrics:
                return Validation(Score(**result.metrics["score"]), result.metrics["samples"])
        last = results[-1].metrics
        if "mistake" in last:
            raise UserError(last["mistake"])
        why = last.get("error", results[-1].status.value)
        raise RunFailed(f"scoring {checkpoint_folder(self._run_dir, step)} failed: {why}")

    def _finished(self, step: int) -> list[ray.train.ReportedCheckpoint]:
        """The reports of a step's checkpoint, all of them dealt with."""
        import ray.train

        pending = ray.train.ReportedCheckpointStatus.PENDING_VALIDATION
        name = checkpoint_folder(self._run_dir, step).name
        while True:
            reported = ray.train.get_all_reported_checkpoints(timeout_s=WAIT_S)
            found = [one for one in reported if Path(one.checkpoint.path).name == name]
            if found and not any(one.status == pending for one in found):
                return found
            self._tell(step)

    def _tell(self, step: int) -> None:
        import ray.train

        if self._has_told or ray.train.get_context().get_world_rank():
            return
        self._has_told = True
        steps = self._config.train.eval_interval
        # On this worker alone, so that it must not fail; and it is only told.
        try_event(
            self._run_dir,
            "waiting",
            message=f"training waits for the score of step {step}: scoring takes longer than "
            f"train.eval_interval={steps} steps, or no worker is free for it",
        )
