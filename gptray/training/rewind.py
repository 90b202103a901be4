"""Takes a run from its stable part to its cool-down: back to the best intact checkpoint.

Nothing is saved here: a run that is killed before the cool-down's first checkpoint resumes at the
stable part's last one and goes back again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from gptray.config import RunFailed
from gptray.storage.record import read_metrics, write_event
from gptray.training.building import build_model
from gptray.training.checkpoint import (
    checkpoint_folder,
    checkpoint_step,
    damage,
    find_checkpoints,
)
from gptray.training.landing import Landing, Reason
from gptray.training.optim import load_optimizer
from gptray.training.run import Run
from gptray.training.sharding import placed_as
from gptray.wording import count


def begin_landing(run: Run, reason: Reason) -> None:
    """Load the weights and moments of the run's best intact checkpoint and begin the landing.

    Every worker calls this at the end of the stable part. Raises RunFailed on every worker if no
    checkpoint is intact, if it cannot be fetched or if the disk is full.
    """
    back_to = run.workers.shared_from_first(lambda: _best_intact(run.run_dir))
    checkpoint = checkpoint_folder(run.run_dir, back_to)
    run.workers.all_or_none(lambda: run.fetch(checkpoint))
    _load(run, checkpoint)
    steps = run.config.optim.cooldown_steps(back_to)
    landing = Landing(run.state.step, back_to, steps, reason)
    run.state = replace(run.state, losses=(), landing=landing)
    run.workers.from_first(lambda: _tell(run, landing))


def _best_intact(run_dir: Path) -> int:
    """The step of the intact checkpoint with the lowest validation loss, the first of ties."""
    losses = {row["step"]: row["val_loss"] for row in read_metrics(run_dir) if "val_loss" in row}
    kept = [step for folder in find_checkpoints(run_dir) if (step := checkpoint_step(folder))]
    for step in sorted(losses.keys() & kept, key=lambda step: (losses[step], step)):
        folder = checkpoint_folder(run_dir, step)
        problem = damage(folder)
        if problem is None:
            return step
        message = f"{folder.name} is damaged: {problem}; landing from the best of the others"
        write_event(run_dir, "damaged", message=message)
    raise RunFailed(f"no checkpoint of {run_dir} is intact, so the run cannot land")


@torch.no_grad()
def _load(run: Run, checkpoint: Path) -> None:
    def load() -> None:
        stored = build_model(
            run.config,
            run.data,
            checkpoint,
            run.device,
            native=run.model.is_native,  # which decides the layout of frozen weights
            tell=lambda message: None,
        )
        weights = zip(run.model.parameters(), stored.parameters(), strict=True)
        for weight, whole in weights:
            if weight.requires_grad:  # frozen ones are the same, and in memory that processes share
                weight.copy_(placed_as(weight, whole))
        load_optimizer(checkpoint / "optimizer.safetensors", run.model, run.optimizer)
        if run.average:
            run.average.load(run.model, checkpoint)

    run.workers.all_or_none(load)


def _tell(run: Run, landing: Landing) -> None:
    why = f"step {landing.start:,} is the last one before the cool-down"
    if landing.reason == "patience":
        assert run.config.train.patience
        # A late score may have changed the progress since, so it cannot tell the count.
        evaluations = count(run.config.train.patience, "evaluation")
        why = f"no new best for {evaluations} at step {landing.start:,}"
    message = (
        f"landing: {why}; going back to step {landing.back_to:,}, the best, to cool down for "
        f"{count(landing.steps, 'step')}, up to step {landing.end:,}"
    )
    write_event(
        run.run_dir,
        "landing",
        step=landing.start,
        back_to=landing.back_to,
        until=landing.end,
        message=message,
    )
