"""Sweeps: trials of a search space, cut at rungs, until it is known which settings generalise best.

The driver plans and records; running the trials on Ray Tune is `gptray.jobs.tune.trials`'s. What a
sweep has decided stands in its trials.jsonl and what its trials measured in their run folders, so
the same command resumes a sweep wherever it was killed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gptray.config import Config, RunFailed, dump, load_config, override
from gptray.data.tokens import TokenData
from gptray.files import replacing, storing
from gptray.jobs.base import Job
from gptray.jobs.cluster import ray_cluster
from gptray.jobs.models import CONFIG
from gptray.jobs.next_steps import resumable
from gptray.jobs.origin import Origin, reachable
from gptray.jobs.other_texts import prepared_also
from gptray.jobs.own_ray import is_own_ray
from gptray.jobs.prepare.run import stored_text
from gptray.jobs.remote_run import publishing
from gptray.jobs.reporter import Reporter
from gptray.jobs.resources import check_cluster, trial_resources
from gptray.jobs.resuming import command, save_config
from gptray.jobs.run_folder import held, seen_at
from gptray.jobs.shared_storage import check_shared_by_training
from gptray.jobs.tracking import tracking_sweep
from gptray.jobs.train.task import TrainTask
from gptray.jobs.tune.check import (
    BUSY,
    CheckedSweep,
    check,
    check_same_validation,
    how_to_extend,
    plan,
)
from gptray.jobs.tune.end import BEST, outcome, tell_winner
from gptray.jobs.tune.start import check_trials, failed_trials, opened
from gptray.jobs.tune.task import TrialTask
from gptray.jobs.tune.watch import watching_sweep
from gptray.reports.sweep.report import write_sweep_report
from gptray.training.checkpoint import exchange_model
from gptray.tuning.optuna_file import write_optuna_file
from gptray.tuning.sweep_record import (
    Record,
    Trial,
    load_sweep,
    load_trials,
    trial_dir,
    winner_dir,
)
from gptray.tuning.table import write_trials_parquet
from gptray.tuning.trial_plan import (
    Planned,
    choose_winner,
    plan_trial,
    replicates,
    text_key,
)

if TYPE_CHECKING:
    from gptray.jobs.tune.suggestions import Suggestions

log = logging.getLogger("gptray")


def tune(config: Config) -> dict[str, object]:
    """Run a sweep, or resume it; return the job's JSON line.

    Raises:
        UserError: a mistake in the config, the space, the text or the folder; no trial was started.
        RunFailed: no trial produced a model, or some failed for a reason that may pass; says why.
    """
    return run(check(config))


def run(checked: CheckedSweep) -> dict[str, object]:
    """Run the sweep, or resume it. Raises as `tune` does."""
    config, folder, place = checked.config, checked.folder, seen_at(checked.config)
    resumes = partial(command, "tune", config, folder)
    with (
        held(folder, busy=BUSY.format(place)),
        publishing(config, folder, sweep=True) as publish,
        resumable(folder, resumes, begun=folder / CONFIG, seen=place),
    ):
        log.info("sweep %s", place)
        reporter = Reporter(folder, _write_report)
        failed = failed_trials(checked.config, folder)
        if winner_dir(folder) and not checked.changes and not failed:
            log.info("%s", how_to_extend(checked))
            reporter.write(running=False)
        else:
            _run(checked, reporter, publish)
    result = load_sweep(folder)
    tell_winner(result, place)
    report = reporter.path and reporter.path.replace(str(folder), place, 1)
    return {**outcome(result, place), "report": report}


def _run(checked: CheckedSweep, reporter: Reporter, publish: Callable[[], None]) -> None:
    """Run the sweep on Ray."""
    config = checked.config
    with ray_cluster(wait_s=config.compute.wait_s):
        check_shared_by_training(config, checked.folder)
        check_cluster(config.compute)
        texts = {key: stored_text(config, text.request) for key, text in checked.texts.items()}
        check_same_validation(texts.values())
        check_trials(checked, texts)
        also = {key: prepared_also(checked.also, config, data) for key, data in texts.items()}
        record = opened(checked)

        def show() -> None:
            reporter.write(running=True)
            publish()

        try:
            with reachable(config, checked.folder) as origin:
                _Sweep(checked, record, texts, also, publish, origin).run(on_change=show)
        finally:
            reporter.write(running=False)


def _write_report(folder: Path, running: bool) -> Path:
    from gptray.tuning.hparams import write_hparams  # loads torch

    write_hparams(folder)
    write_optuna_file(folder)
    if not running:
        write_trials_parquet(folder)
    return write_sweep_report(folder, running=running)


class _Sweep:
    """A sweep that runs: its texts are prepared, Ray is there. To Ray Tune it is a queue."""

    def __init__(
        self,
        checked: CheckedSweep,
        record: Record,
        texts: Mapping[str, TokenData],
        also: Mapping[str, Mapping[str, Path]],
        publish: Callable[[], None],
        origin: Origin | None,
    ) -> None:
        self._config, self._folder, self._checked = checked.config, checked.folder, checked
        self._record, self._publish, self._origin = record, publish, origin
        self._at_once, self._reserved = trial_resources(
            checked.config.compute,
            trials=checked.num_trials,
            at_once=checked.config.tune.max_concurrent_trials,
        )
        self._texts, self._also = texts, also
        self._suggestions: Suggestions | None = None
        self._waiting: deque[Planned] = deque()
        self.is_over = False
        self.failure: RunFailed | None = None

    def run(self, *, on_change: Callable[[], None]) -> None:
        """Run what is still to run, name the winner and keep its model.

        `on_change` is called now and then, from a thread, when trials have something new.
        """
        from gptray.jobs.tune.trials import run_trials

        self._write_down(self._checked.trials)
        if self._config.tune.search_alg == "optuna":
            from gptray.jobs.tune.suggestions import Suggestions

            self._suggestions = Suggestions(
                self._config, self._folder, self._record, num_trials=self._checked.num_trials
            )
        past = load_trials(self._folder)
        # Those that an earlier start had begun resume first.
        waiting = sorted((one for one in past if not one.outcome), key=lambda one: not one.started)
        self._waiting.extend(self._planned(trial) for trial in waiting)
        num_trials = self._checked.num_trials + self._checked.num_replicates
        with (
            tracking_sweep(self._config, self._folder),
            watching_sweep(self._folder, num_trials, on_change=on_change),
        ):
            run_trials(
                self._config,
                self._folder,
                self,
                past,
                at_once=self._at_once,
                reserved=self._reserved,
            )
        if self.failure:
            raise self.failure
        self._finish()

    def next(self) -> Planned | None:
        """The next trial to run; None while that depends on running ones, or when `is_over`."""
        if self.failure:
            self.is_over = True
            return None
        if not self._waiting and self._suggestions:
            suggested = self._suggestions.suggest()
            self._waiting.extend([suggested] if suggested else [])
        if not self._waiting:
            trials = load_trials(self._folder)
            if any(trial.outcome is None for trial in trials):
                return None
            if failed_trials(self._config, self._folder):
                self.is_over = True  # the best are known once these have run again
                return None
            self._waiting.extend(
                self._write_down(replicates(self._config, seen_at(self._config), trials))
            )
        self.is_over = not self._waiting
        return self._waiting.popleft() if self._waiting else None

    def started(self, name: str) -> None:
        """A trial's process has begun with it."""
        self._record.started(name)

    def ended(
        self, name: str, outcome: str, *, step: int, message: str | None, passing: bool
    ) -> None:
        """A trial has come to an end."""
        self._record.ended(name, outcome, step=step, message=message, passing=passing)
        self._publish()
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
        planned = plan_trial(self._config, seen_at(self._config), trial.name, trial.values)
        return replace(planned, replicate_of=trial.replicate_of)

    def task(self, planned: Planned) -> TrialTask:
        """What a trial's process is given; makes its run folder."""
        config, cores = planned.config, self._reserved["CPU"]
        if cores.is_integer():
            # Sums over threads depend on their number, so a trial's config names it.
            config = override(config, {"compute.cpus_per_worker": int(cores)})
        folder = trial_dir(self._folder, planned.name)
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder)
        text = text_key(planned.config)
        run = TrainTask(
            config,
            self._texts[text].data_dir,
            folder,
            threads=max(1, int(cores)),
            may_lose_nodes=not is_own_ray(),
            origin=self._origin,
            also=self._also[text],
        )
        is_cut = planned.replicate_of is None
        return TrialTask(planned.name, run, is_cut, self._reserved)

    def _finish(self) -> None:
        trials = load_trials(self._folder)
        failed = [trial for trial in trials if trial.passing]
        if failed:
            told = f"{len(failed)} of {len(trials)} trials failed: {failed[0].message}"
            if self._config.tune.retry_failed:
                raise RunFailed(
                    f"{told}; the same command runs them again; tune.retry_failed=false takes the "
                    "best of the others"
                )
            log.warning("%s; the best of the others wins", told)
        winner = choose_winner(trials)
        if winner is None:
            reasons = [f"  {one.name} {one.outcome}: {one.message or '-'}" for one in trials]
            raise RunFailed("no trial produced a model:\n" + "\n".join(reasons))
        exchange_model(trial_dir(self._folder, winner.name), self._folder)
        own = {"name": None, "storage_path": self._config.storage_path}
        trained = load_config(str(trial_dir(self._folder, winner.name) / "config.yaml"), [])
        best = override(trained, own)
        path = self._folder / BEST
        with storing(path), replacing(path) as draft:
            draft.write_text(dump(best), "utf-8")
        self._record.winner(winner.name)


JOB = Job(check, plan, run)
