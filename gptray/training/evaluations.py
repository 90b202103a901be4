"""An evaluation: a score, early stopping told of it, a checkpoint, the best model published.

`InLine` has training wait while all workers score. `Beside` hands the checkpoint to somebody else
and goes on training; who scores it, and where, is not this file's matter. A score then counts at
the next evaluation, never earlier or later: what a run does depends on no clock.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptray.config import dump
from gptray.data.openings import first_words
from gptray.data.scoring import Score
from gptray.model.example import save_example
from gptray.model.gpt import GPT
from gptray.model.hf import save_pretrained
from gptray.record import write_event
from gptray.training.checkpoint import (
    checkpoint_folder,
    prune,
    publish_model,
    save_checkpoint,
    withdraw_checkpoint,
)
from gptray.training.journal import Journal
from gptray.training.optim import save_optimizer
from gptray.training.run import Run
from gptray.training.stopping import NonFiniteLoss
from gptray.training.validation import score_split

Metrics = dict[str, Any]
Report = Callable[[Metrics, Path | None], None]
# (prompt, continuation) of each.
Samples = list[tuple[str, str]]


@dataclass(frozen=True)
class Validation:
    """What was found out about a checkpoint beside the training."""

    score: Score
    samples: Samples


class InLine:
    """Evaluations for which training waits."""

    def __init__(
        self,
        run: Run,
        journal: Journal | None,
        report: Report,
        sample: Callable[[GPT], Samples],
    ) -> None:
        self._run, self._journal, self._report, self._sample = run, journal, report, sample

    def add(self, row: Metrics) -> None:
        """Evaluate the model as it is; put the score into the step's row.

        Raises:
            NonFiniteLoss: on every worker, before anything is saved.
            UserError, RunFailed: on every worker, what keeping or sampling met on the first.
        """
        run, journal = self._run, self._journal
        score = score_split(
            run.model,
            run.data.val,
            block_size=run.config.train.block_size,
            batch_size=run.config.micro_batch_size,
            workers=run.workers,
        )
        judge(run, run.state.step, score)
        row |= score_fields(score, row["train_loss"])

        def keep() -> Path:
            assert journal
            journal.write(row)
            checkpoint = save(run, journal)
            publish_if_best(run, run.state.step)
            tell(run, journal, run.state.step, self._sample(run.model))
            return checkpoint

        self._report(row, run.workers.from_first(keep))

    def finish(self) -> None:
        """Nothing is left to do."""


class Beside:
    """Evaluations that go on while training does; at most one has no score yet.

    That one's checkpoint is the newest, so pruning spares it, and a run that was killed begins by
    having it scored again. `validated(step)` waits for what `report` has set going.
    """

    def __init__(
        self,
        run: Run,
        journal: Journal | None,
        report: Report,
        validated: Callable[[int], Validation],
    ) -> None:
        self._run, self._journal = run, journal
        self._report, self._validated = report, validated
        self._unscored: Metrics | None = None
        if step := run.state.step:
            row = run.workers.from_first(lambda: journal.row(step) if journal else None)
            self._unscored = row or {"step": step}
            report({"step": step}, checkpoint_folder(run.run_dir, step) if journal else None)

    def add(self, row: Metrics) -> None:
        """Save the model as it is and have it scored; take in the score of the one before.

        Raises:
            NonFiniteLoss: of the one before, on every worker; this one is not saved.
        """
        run, journal = self._run, self._journal
        if journal:
            journal.write(row)
        self.finish()
        checkpoint = run.workers.from_first(lambda: save(run, journal) if journal else None)
        self._unscored = row
        self._report(row, checkpoint)

    def finish(self) -> None:
        """Wait for the score that is still to come; put it into the row that was given.

        Raises:
            NonFiniteLoss: on every worker; the checkpoint is no longer one.
            UserError, RunFailed: on every worker, what scoring or keeping met.
        """
        if not self._unscored:
            return
        run, row, self._unscored = self._run, self._unscored, None
        step = row["step"]
        validation = self._validated(step)
        try:
            judge(run, step, validation.score)
        except NonFiniteLoss:
            run.workers.from_first(lambda: withdraw_checkpoint(run.run_dir, step))
            raise

        def keep() -> None:
            assert self._journal
            row.update(score_fields(validation.score, row["train_loss"]))
            publish_if_best(run, step)
            self._journal.amend(row)
            tell(run, self._journal, step, validation.samples)
            remove_old(run)

        run.workers.from_first(keep)


def judge(run: Run, step: int, score: Score) -> None:
    """Tell early stopping what a step's model scores.

    Raises:
        NonFiniteLoss: the score is no number; nothing was told.
    """
    if not score.is_finite:
        raise NonFiniteLoss(f"step {step}: validation loss {score.loss}")
    progress = run.state.progress.after(step, score.loss, min_delta=run.config.train.min_delta)
    run.state = replace(run.state, progress=progress)


def score_fields(score: Score, train_loss: float) -> Metrics:
    """What an evaluation adds to the row of its step; `val_lost` only where text is lost.

    Then the perplexity may be too large for a float, and is the largest that there is.
    """
    return {
        "val_loss": score.loss,
        "val_ppl": min(score.perplexity, sys.float_info.max),
        "val_bpb": score.bits_per_byte,
        "gap": score.loss - train_loss,
        **({"val_lost": score.lost} if score.lost_bytes else {}),
    }


def save(run: Run, journal: Journal) -> Path:
    """Write the checkpoint of this step, after the rows up to it; remove those out of date."""
    journal.sync()

    def write_tensors(folder: Path) -> None:
        save_pretrained(run.model, folder / "model", eos_token_id=run.data.eos_id)
        shutil.copytree(run.data.data_dir / "tokenizer", folder / "model", dirs_exist_ok=True)
        for prompt in first_words(run.data)[:1]:
            save_example(folder / "model", prompt)
        save_optimizer(folder / "optimizer.safetensors", run.model, run.optimizer)

    checkpoint = save_checkpoint(
        run.run_dir,
        run.state,
        config_yaml=dump(run.config),
        write_tensors=write_tensors,
    )
    remove_old(run)
    return checkpoint


def remove_old(run: Run) -> None:
    """Remove the checkpoints that are neither new nor the best."""
    spare = {run.state.step, run.state.progress.best_step}
    prune(run.run_dir, run.config.compute.num_to_keep, spare=spare)


def publish_if_best(run: Run, step: int) -> None:
    """Make a step's model the run's, if none before it was as good."""
    if run.state.progress.best_step == step:
        publish_model(checkpoint_folder(run.run_dir, step), run.run_dir)


def tell(run: Run, journal: Journal, step: int, samples: Samples) -> None:
    """Say that a step has been evaluated, and what its model writes."""
    journal.write_samples(step, samples)
    is_best = run.state.progress.best_step == step
    write_event(run.run_dir, "evaluated", step=step, best=is_best, samples=samples)
