"""Evaluations: score the model, update early stopping, save a checkpoint, publish the best.

With `BlockingEvaluation`, training waits while all workers score. `AsyncEvaluation` hands over the
checkpoint and training continues; the caller decides who scores it, and where. The score takes
effect exactly at the next evaluation, so a run does not depend on timing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptray.config import dump
from gptray.model.adapter import ADAPTER
from gptray.model.adapter_files import save_adapter
from gptray.model.gpt import GPT
from gptray.storage.record import write_event
from gptray.training.checkpoint import (
    AVERAGED,
    MODEL,
    checkpoint_folder,
    prune,
    save_checkpoint,
    withdraw_checkpoint,
)
from gptray.training.optim import save_optimizer
from gptray.training.publishing import save_model
from gptray.training.run import Run
from gptray.training.stopping import NonFiniteLoss
from gptray.training.validation import Scores, score_weights

Metrics = dict[str, Any]
Report = Callable[[Metrics, Path | None], None]
# (prompt, continuation) pairs.
Samples = list[tuple[str, str]]


@dataclass(frozen=True)
class Validation:
    """The result of scoring a checkpoint while training continues."""

    scores: Scores
    samples: Samples


class BlockingEvaluation:
    """Evaluations that training waits for."""

    def __init__(self, run: Run, report: Report, sample: Callable[[GPT], Samples]) -> None:
        self._run, self._report, self._sample = run, report, sample

    def add(self, row: Metrics) -> None:
        """Evaluate the model and add the score to the step's row.

        Raises, on every worker, NonFiniteLoss before anything is saved, or UserError or RunFailed
        if saving or sampling failed on the first.
        """
        run = self._run
        scores = score_weights(run.model, run.average, run.config, run.data, run.workers)
        update_early_stopping(run, run.state.step, scores)
        row |= score_fields(scores, row["train_loss"])

        def keep() -> Path:
            assert run.journal
            run.journal.write(row)
            checkpoint = save(run)
            run.publish_if_best(run.state.step)
            with run.average.swapped() if run.average and scores.is_averaged else nullcontext():
                samples = self._sample(run.model)
            log_evaluation(run, run.state.step, samples)
            return checkpoint

        self._report(row, run.workers.from_first(keep))

    def finish(self) -> None:
        """Nothing is pending."""


class AsyncEvaluation:
    """Evaluations that run while training continues; at most one is pending.

    Its checkpoint is the newest, so pruning keeps it, and a killed run has it scored again when it
    resumes. `report` starts the scoring; `validated(step)` waits for the result.
    """

    def __init__(self, run: Run, report: Report, validated: Callable[[int], Validation]) -> None:
        self._run, self._report, self._validated = run, report, validated
        self._pending: Metrics | None = None
        if step := run.state.evaluated:
            journal = run.journal
            row = run.workers.from_first(lambda: journal.row(step) if journal else None)
            self._pending = row or {"step": step}
            report({"step": step}, checkpoint_folder(run.run_dir, step) if journal else None)

    def add(self, row: Metrics) -> None:
        """Record the pending score, then save the model and have it scored.

        If the pending score is not finite, raises NonFiniteLoss on every worker and saves nothing.
        """
        run = self._run
        if run.journal:
            run.journal.write(row)
        self.finish()
        checkpoint = run.workers.from_first(lambda: save(run))
        self._pending = row
        self._report(row, checkpoint)

    def finish(self) -> None:
        """Wait for the pending score, if there is one, and add it to its row.

        Raises, on every worker, NonFiniteLoss after withdrawing the checkpoint, or UserError or
        RunFailed if scoring or saving failed.
        """
        if not self._pending:
            return
        run, row, self._pending = self._run, self._pending, None
        step = row["step"]
        validation = self._validated(step)
        try:
            update_early_stopping(run, step, validation.scores)
        except NonFiniteLoss:
            run.workers.from_first(lambda: withdraw_checkpoint(run.run_dir, step))
            raise

        def keep() -> None:
            assert run.journal
            row.update(score_fields(validation.scores, row["train_loss"]))
            run.publish_if_best(step)
            run.journal.amend(row)
            log_evaluation(run, step, validation.samples)
            remove_old(run)

        run.workers.from_first(keep)


Evaluations = BlockingEvaluation | AsyncEvaluation


def evaluate_base(run: Run) -> None:
    """Record the score of model.init_from before the first step.

    Raises NonFiniteLoss on every worker, since such weights cannot be trained.
    """
    if run.config.model.init_from is None or run.state.step:
        return
    scores = score_weights(run.model, None, run.config, run.data, run.workers)
    if strange := scores.not_finite:
        raise NonFiniteLoss(f"validation loss {strange.loss} before the first step")
    own = scores.own
    fields = {"val_loss": own.loss, "val_bpb": own.bits_per_byte, **also_fields(scores)}
    run.workers.from_first(lambda: write_event(run.run_dir, "base", **fields))


def update_early_stopping(run: Run, step: int, scores: Scores) -> None:
    """Update the run's progress with the validation loss of a step.

    Raises NonFiniteLoss if a score is not finite, and leaves the progress unchanged.
    """
    if strange := scores.not_finite:
        raise NonFiniteLoss(f"step {step}: validation loss {strange.loss}")
    progress = run.state.progress.after(
        step,
        scores.better.loss,
        min_delta=run.config.train.min_delta,
        averaged=scores.is_averaged,
    )
    run.state = replace(run.state, progress=progress)


def score_fields(scores: Scores, train_loss: float) -> Metrics:
    """The metrics that an evaluation adds to its step's row, for the better of weights and average.

    `val_lost` is present only if text is lost, `val_loss_own` and `val_loss_ema` only with
    train.ema. The perplexity of lossy text may overflow a float; it is capped at the largest.
    """
    score, ema = scores.better, scores.averaged
    return {
        "val_loss": score.loss,
        "val_ppl": min(score.perplexity, sys.float_info.max),
        "val_bpb": score.bits_per_byte,
        "gap": score.loss - train_loss,
        **({"val_lost": score.lost} if score.lost_bytes else {}),
        **({"val_loss_own": scores.own.loss, "val_loss_ema": ema.loss} if ema else {}),
        **also_fields(scores),
    }


def also_fields(scores: Scores) -> Metrics:
    """The scores of evaluate.also's texts, if there are any."""
    also = {
        name: {"loss": score.loss, "bpb": score.bits_per_byte}
        for name, score in scores.also.items()
    }
    return {"also": also} if also else {}


def save(run: Run) -> Path:
    """Write this step's checkpoint once its rows are on disk; remove outdated checkpoints."""
    assert run.journal
    run.journal.sync()

    def write_tensors(folder: Path) -> None:
        if run.base:
            save_adapter(run.model, folder / ADAPTER, run.base, run.config.lora)
        else:
            save_model(run.model, folder / MODEL, run.data)
        if run.average:
            with run.average.swapped():
                save_model(run.model, folder / AVERAGED, run.data)
        path = folder / "optimizer.safetensors"
        save_optimizer(path, run.model, run.optimizer, full_tensor=run.model.full_tensor)

    config = dump(run.config)
    checkpoint = save_checkpoint(
        run.run_dir, run.state, config_yaml=config, write_tensors=write_tensors
    )
    remove_old(run)
    return checkpoint


def remove_old(run: Run) -> None:
    """Remove checkpoints that are not recent, the best, awaiting a score or a landing's start."""
    spare = {run.state.step, run.state.evaluated, run.state.progress.best_step}
    if run.state.landing:
        spare.add(run.state.landing.back_to)
    prune(run.run_dir, run.config.compute.num_to_keep, spare=spare)


def log_evaluation(run: Run, step: int, samples: Samples) -> None:
    """Log that a step has been evaluated, with text samples from its model."""
    assert run.journal
    run.journal.write_samples(step, samples)
    is_best = run.state.progress.best_step == step
    write_event(run.run_dir, "evaluated", step=step, best=is_best, samples=samples)
