"""Sweeps: trials of a search space, cut at rungs, until it is known which settings generalise best.

The driver plans and records; running the trials on Ray Tune is `gptray.runners.trials`'s. What a
sweep has decided stands in its trials.jsonl and what its trials measured in their run folders, so
the same command goes on with a sweep wherever it was killed.
"""

from __future__ import annotations

import collections
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptray.config import Config, RunFailed, UserError, dump, load_config, override
from gptray.data.tokens import TokenData
from gptray.files import replacing
from gptray.runners.cluster import ray_cluster, trial_resources
from gptray.runners.prepare import prepare
from gptray.runners.report import Reporter
from gptray.runners.runs import held, save_config
from gptray.runners.sweep_plan import SweepPlan, look_at_sweep
from gptray.runners.sweep_watch import watching_sweep
from gptray.runners.train import check_data
from gptray.training.checkpoint import TrainerState, newest_whole, publish_model
from gptray.tuning.plan import (
    Planned,
    choose_winner,
    plan_trial,
    replicates,
    text_key,
)
from gptray.tuning.record import OUTCOMES, Record, Trial, load_sweep, load_trials, trial_dir

if TYPE_CHECKING:
    from gptray.runners.suggestions import Suggestions

log = logging.getLogger("gptray")
BEST = "best.yaml"


def tune(config: Config) -> dict[str, Any]:
    """Run a sweep, or go on with it; return the job's JSON line.

    Raises:
        UserError: a mistake in the config, the space, the text or the folder; no trial was started.
        RunFailed: no trial came to a model; says why.
    """
    plan = look_at_sweep(config)
    folder = plan.folder
    with held(folder, busy=f"another process runs the sweep {folder}"):
        save_config(plan.config, folder)
        log.info("sweep %s", folder)
        reporter = Reporter(folder, _write_report)
        if load_sweep(folder).winner:
            log.info(
                "this sweep is finished; another name, or train.resume=never, starts a new one"
            )
            reporter.write(running=False)
        else:
            with Record(folder) as record, ray_cluster():
                try:
                    _Sweep(plan, record).run(on_change=lambda: reporter.write(running=True))
                finally:
                    reporter.write(running=False)
    return {**outcome(folder), "report": reporter.path}


def _write_report(folder: Path, running: bool) -> Path:
    from gptray.tuning.report import write_sweep_report
    from gptray.tuning.table import write_trials_parquet

    if not running:
        write_trials_parquet(folder)
    return write_sweep_report(folder, running=running)


class _Sweep:
    """A sweep that runs: its texts are prepared, Ray is there. To Ray Tune it is a queue."""

    def __init__(self, plan: SweepPlan, record: Record) -> None:
        self._config, self._folder, self._plan = plan.config, plan.folder, plan
        self._record = record
        self._at_once, self._reserved = trial_resources(
            plan.config.compute,
            trials=plan.num_trials,
            at_once=plan.config.tune.max_concurrent_trials,
        )
        self._texts = {text_key(text): prepare(text) for text in plan.texts}
        _check_texts(list(self._texts.values()))
        _share_texts(self._folder)
        self._suggestions: Suggestions | None = None
        self._waiting: deque[Planned] = deque()
        self.is_over = False

    def run(self, *, on_change: Callable[[], None]) -> None:
        """Run what is still to run, name the winner and keep its model.

        `on_change` is called now and then, from a thread, when trials have something new.
        """
        from gptray.runners.trials import run_trials

        self._write_down(self._plan.trials)
        self._check_trials()
        if self._config.tune.search_alg == "optuna":
            from gptray.runners.suggestions import Suggestions

            self._suggestions = Suggestions(
                self._config, self._folder, self._record, num_trials=self._plan.num_trials
            )
        past = load_trials(self._folder)
        # Those that an earlier start had begun go on first.
        waiting = sorted((one for one in past if not one.outcome), key=lambda one: not one.started)
        self._waiting.extend(self._planned(trial) for trial in waiting)
        num_trials = self._plan.num_trials + self._plan.num_replicates
        with watching_sweep(self._folder, num_trials, on_change=on_change):
            run_trials(
                self._config,
                self._folder,
                self,
                past,
                at_once=self._at_once,
                reserved=self._reserved,
            )
        self._finish()

    def next(self) -> Planned | None:
        """The next trial to run; None while only running trials can tell, or when `is_over`."""
        if not self._waiting and self._suggestions:
            suggested = self._suggestions.suggest()
            self._waiting.extend([suggested] if suggested else [])
        if not self._waiting:
            trials = load_trials(self._folder)
            if any(trial.outcome is None for trial in trials):
                return None
            self._waiting.extend(
                self._write_down(replicates(self._config, str(self._folder), trials))
            )
        self.is_over = not self._waiting
        return self._waiting.popleft() if self._waiting else None

    def started(self, name: str) -> None:
        """A trial's process has begun with it."""
        self._record.started(name)

    def ended(self, name: str, outcome: str, *, step: int, message: str | None) -> None:
        """A trial has come to an end."""
        self._record.ended(name, outcome, step=step, message=message)
        if self._suggestions:
            self._suggestions.over(name)

    def _write_down(self, trials: Sequence[Planned]) -> list[Planned]:
        """Put those into the record that are not there; return them."""
        known = {trial.name for trial in load_trials(self._folder)}
        new = [planned for planned in trials if planned.name not in known]
        for planned in new:
            self._record.planned(
                planned.name,
                planned.values,
                max_steps=planned.config.train.max_steps,
                replicate_of=planned.replicate_of,
            )
        return new

    def _planned(self, trial: Trial) -> Planned:
        planned = plan_trial(self._config, str(self._folder), trial.name, trial.values)
        return replace(planned, replicate_of=trial.replicate_of)

    def settings(self, planned: Planned) -> dict[str, Any]:
        """What a trial's process is told, see `run_trial`; makes its run folder."""
        config, cores = planned.config, self._reserved["CPU"]
        if cores.is_integer():
            # Sums over threads depend on their number, so a trial's config names it.
            config = override(config, {"compute.cpus_per_worker": int(cores)})
        folder = trial_dir(self._folder, planned.name)
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder)
        return {
            "trial": planned.name,
            "is_cut": planned.replicate_of is None,
            "config": config.model_dump(mode="json"),
            "run_dir": str(folder),
            "data_dir": str(self._text(planned).data_dir),
            "threads": max(1, int(cores)),
        }

    def _text(self, planned: Planned) -> TokenData:
        return self._texts[text_key(planned.config)]

    def _check_trials(self) -> None:
        """Refuse texts that a trial cannot be trained on. Raises UserError with all of them."""
        problems: dict[str, str] = {}
        for trial in load_trials(self._folder):
            if trial.outcome is None:
                planned = self._planned(trial)
                try:
                    state = _state(trial_dir(self._folder, trial.name))
                    check_data(planned.config, self._text(planned), state)
                except UserError as error:
                    problems.setdefault(str(error), trial.name)
        if problems:
            raise UserError("\n".join(f"trial {name}: {text}" for text, name in problems.items()))

    def _finish(self) -> None:
        trials = load_trials(self._folder)
        winner = choose_winner(trials)
        if winner is None:
            reasons = [f"  {one.name} {one.outcome}: {one.message or '-'}" for one in trials]
            raise RunFailed("no trial came to a model:\n" + "\n".join(reasons))
        publish_model(trial_dir(self._folder, winner.name), self._folder)
        own = {"name": None, "storage_path": self._config.storage_path}
        trained = load_config(str(trial_dir(self._folder, winner.name) / "config.yaml"), [])
        best = override(trained, own)
        with replacing(self._folder / BEST) as draft:
            draft.write_text(dump(best))
        self._record.winner(winner.name)


def outcome(folder: Path) -> dict[str, Any]:
    """What a finished sweep has come to: the job's JSON line.

    `best_*` are the winner's, at its lowest validation loss; `baseline_val_bpb` is that of the
    trial of the config as it is. `steps_full` counts all trials as if none had stopped early.
    """
    sweep = load_sweep(folder)
    winner = next(trial for trial in sweep.trials if trial.name == sweep.winner)
    baseline = next((one for one in sweep.trials if not one.values and one.best), None)
    counts = collections.Counter(trial.outcome for trial in sweep.trials)
    assert winner.best
    return {
        "sweep_dir": str(folder),
        "best_config": str(folder / BEST),
        "best_trial": winner.name,
        "best_val_loss": winner.best["val_loss"],
        "best_val_bpb": winner.best["val_bpb"],
        "baseline_val_bpb": baseline.best["val_bpb"] if baseline and baseline.best else None,
        "model_dir": str(folder / "model"),
        "trials": len(sweep.trials),
        "trials_stopped_early": counts["stopped"] + counts["patience"],
        "outcomes": {name: counts[name] for name in OUTCOMES},
        "steps_run": sum(trial.step for trial in sweep.trials),
        "steps_full": sum(trial.max_steps for trial in sweep.trials),
    }


def _state(run_dir: Path) -> TrainerState | None:
    """Where a trial stands; None also where its checkpoints are damaged, which it says itself."""
    try:
        checkpoint, _ = newest_whole(run_dir)
    except RunFailed:
        return None
    return TrainerState.load(checkpoint) if checkpoint else None


def _check_texts(texts: Sequence[TokenData]) -> None:
    """Refuse texts whose validation splits differ. Raises UserError."""
    sizes = {(text.val.documents, text.val.bytes) for text in texts}
    if len(sizes) > 1:
        found = ", ".join(f"{count} documents of {size:,} bytes" for count, size in sorted(sizes))
        raise UserError(
            f"tune.space: trials would be validated on different text ({found}); give all of them "
            "the same data.source and share for validation, or one data.val_source"
        )


def _share_texts(folder: Path) -> None:
    """Let a trial's run folder find the sweep's prepared texts where an ordinary run would."""
    link = folder / "trials" / "data"
    link.parent.mkdir(exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(Path("..") / ".." / "data")
