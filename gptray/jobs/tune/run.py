"""The tune job: compares trials of a search space at rungs to find which generalises best.

The driver plans and records; `gptray.jobs.tune.trials` runs the trials on Ray Tune. The sweep's
decisions are in its trials.jsonl and its trials' measurements in their run folders, so the same
command resumes a sweep wherever it was killed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gptray.config import Config, RunFailed, dump, expect_config, load_config, override
from gptray.jobs.cluster.connection import ray_cluster
from gptray.jobs.cluster.resources import check_cluster
from gptray.jobs.cluster.shared_storage import check_shared_by_training
from gptray.jobs.folders.origin import reachable
from gptray.jobs.folders.remote_run import publishing
from gptray.jobs.folders.resuming import command
from gptray.jobs.folders.run_folder import run_place
from gptray.jobs.models import CONFIG
from gptray.jobs.next_steps import resumable
from gptray.jobs.prepare.run import prepared_also, stored_text
from gptray.jobs.progress.reporter import Reporter
from gptray.jobs.progress.tracking import tracking_sweep
from gptray.jobs.tune.check import (
    BUSY,
    CheckedSweep,
    check,
    check_same_validation,
    how_to_extend,
)
from gptray.jobs.tune.end import outcome, tell_winner
from gptray.jobs.tune.queue import SweepQueue
from gptray.jobs.tune.start import check_trials, failed_trials, opened
from gptray.jobs.tune.trials import run_trials
from gptray.jobs.tune.watch import watching_sweep
from gptray.reports.sweep.report import write_sweep_report
from gptray.storage.driver_lock import held
from gptray.storage.files import replacing, storing
from gptray.training.checkpoint import replace_model
from gptray.tuning.optuna_file import write_optuna_file
from gptray.tuning.sweep_record import Record, load_sweep, load_trials, trial_dir, winner_dir
from gptray.tuning.table import write_trials_parquet
from gptray.tuning.trial_plan import choose_winner
from gptray.tuning.winner_commands import BEST
from gptray.wording import count

log = logging.getLogger("gptray")


def tune(config: Config) -> dict[str, object]:
    """Run a sweep, or resume it; return the job's JSON line.

    Raises:
        UserError: a mistake in the config, the space, the text or the folder; no trial was started.
        RunFailed: no trial produced a model, or some failed for a transient reason; says why.
    """
    return run(check(expect_config(config)))


def run(checked: CheckedSweep) -> dict[str, object]:
    """Run the sweep, or resume it. Raises like `tune`."""
    config, folder, place = checked.config, checked.folder, run_place(checked.config)
    resumes = partial(command, "tune", config, folder)
    with (
        held(folder, busy=BUSY.format(place)),
        publishing(config, folder, sweep=True) as publish,
        resumable(folder, resumes, begun=folder / CONFIG, place=place),
    ):
        log.info("sweep %s", place)
        reporter = Reporter(folder, place, _write_report)
        failed = failed_trials(checked.config, folder)
        if winner_dir(folder) and not checked.changes and not failed:
            log.info("%s", how_to_extend(checked))
            reporter.write(running=False)
        else:
            _run(checked, reporter, publish)
    result = load_sweep(folder)
    tell_winner(result, place)
    return {**outcome(result, place), "report": reporter.path}


def _run(checked: CheckedSweep, reporter: Reporter, publish: Callable[[], None]) -> None:
    """Run the sweep on Ray."""
    config, folder = checked.config, checked.folder
    num_trials = checked.num_trials + checked.num_replicates
    with ray_cluster(wait_s=config.compute.wait_s):
        check_shared_by_training(config, folder)
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
            with reachable(config, folder) as origin:
                queue = SweepQueue(checked, record, texts, also, publish, origin)
                with (
                    tracking_sweep(config, folder),
                    watching_sweep(folder, num_trials, on_change=show),
                ):
                    run_trials(config, folder, queue)
                    if queue.failure:
                        raise queue.failure
            _finish(config, folder, record)
        finally:
            reporter.write(running=False)


def _write_report(folder: Path, running: bool) -> Path:
    from gptray.tuning.hparams import write_hparams  # loads torch

    write_hparams(folder)
    write_optuna_file(folder)
    if not running:
        write_trials_parquet(folder)
    return write_sweep_report(folder, running=running)


def _finish(config: Config, folder: Path, record: Record) -> None:
    """Record the winner and copy its model and config."""
    trials = load_trials(folder)
    failed = [trial for trial in trials if trial.passing]
    if failed:
        told = f"{len(failed)} of {count(len(trials), 'trial')} failed: {failed[0].message}"
        if config.tune.retry_failed:
            raise RunFailed(
                f"{told}; the same command runs them again; with tune.retry_failed=false the "
                "best of the others wins"
            )
        log.warning("%s; the best of the others wins", told)
    winner = choose_winner(trials)
    if winner is None:
        reasons = [f"  {one.name} {one.outcome}: {one.message or '-'}" for one in trials]
        raise RunFailed("no trial produced a model:\n" + "\n".join(reasons))
    replace_model(trial_dir(folder, winner.name), folder)
    own = {"name": None, "storage_path": config.storage_path}
    trained = load_config(str(trial_dir(folder, winner.name) / CONFIG), [])
    best = override(trained, own)
    path = folder / BEST
    with storing(path), replacing(path) as draft:
        draft.write_text(dump(best), "utf-8")
    record.write("winner", trial=winner.name)
