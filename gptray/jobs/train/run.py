"""The train job: Ray Train runs `gptray.training.loop.fit` in data-parallel workers.

The driver prepares the text, shows progress and reports the outcome; each worker runs the loop on
its share of the cores or on its GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gptray.config import Config, RunFailed, UserError, expect_config
from gptray.jobs.cluster.connection import NO_SPARE_WORKERS, ray_cluster
from gptray.jobs.cluster.resources import check_cluster
from gptray.jobs.cluster.shared_storage import check_shared_by_training
from gptray.jobs.folders.remote_run import publishing
from gptray.jobs.folders.resuming import command, how_to_train_longer, save_config
from gptray.jobs.folders.run_folder import outcome, run_place, set_ray_snapshot_aside
from gptray.jobs.models import CONFIG, has_model
from gptray.jobs.next_steps import resumable, tell_run
from gptray.jobs.prepare.run import prepared_also, stored_text
from gptray.jobs.progress.reporter import Reporter
from gptray.jobs.progress.tracking import tracking_run
from gptray.jobs.train.check import BUSY, CheckedTraining, check, check_data
from gptray.jobs.train.fitting import fit_on_ray, spare_workers
from gptray.jobs.train.given_models import trained_facts
from gptray.jobs.train.watch import show_end, watching
from gptray.storage.driver_lock import held
from gptray.storage.record import try_event, write_event

log = logging.getLogger("gptray")


def train(config: Config) -> dict[str, Any]:
    """Train a model as the config says, or resume its run; return the job's JSON line.

    Raises:
        UserError: a mistake in the config, the text or the run folder; nothing was started.
        RunFailed: the run stopped: a non-finite loss, no intact checkpoint, too many failures.
    """
    return run(check(expect_config(config)))


def run(checked: CheckedTraining) -> dict[str, Any]:
    """Train, or resume the run. Raises like `train`."""
    config, folder, state = checked.config, checked.folder, checked.state
    place, last = run_place(config), config.train.max_steps
    resumes = partial(command, "train", config, folder)
    with (
        held(folder, busy=BUSY.format(place)),
        publishing(config, folder) as publish,
        resumable(folder, resumes, begun=folder / CONFIG, steps=last, place=place),
    ):
        log.info("run %s", place)
        reporter = Reporter(folder, place)
        if state and checked.is_finished:
            _begin(checked)
            log.info("%s", how_to_train_longer(config, folder, state))
            facts = {}
            reporter.write(running=False)
        else:
            facts = _train(checked, reporter, publish)
        show_end(folder)
        tell_run(config, folder)
    return {**outcome(config), **trained_facts(config), **facts, "report": reporter.path}


def _begin(checked: CheckedTraining) -> None:
    """Save a run's config, and log what has changed in it."""
    save_config(checked.config, checked.folder)
    for change in checked.changes:
        log.info("%s", change)
        write_event(checked.folder, "notice", message=change)


def _train(
    checked: CheckedTraining, reporter: Reporter, publish: Callable[[], None]
) -> dict[str, Any]:
    """Train; return the facts that only the training processes know."""
    config, folder = checked.config, checked.folder
    with ray_cluster(NO_SPARE_WORKERS, wait_s=config.compute.wait_s):
        check_shared_by_training(config, folder)
        check_cluster(config.compute, spare=spare_workers(config))
        data = stored_text(config, checked.text.request)
        check_data(config, data, checked.state)
        resumed = folder if checked.state else None
        also = prepared_also(checked.also, config, data, resumed=resumed)
        _begin(checked)

        def show() -> None:
            reporter.write(running=True)
            publish()

        torn = set_ray_snapshot_aside(folder)
        if torn:
            log.warning("%s", torn)
        with tracking_run(config, folder):
            try:
                with watching(folder, config.train.max_steps, on_evaluation=show):
                    result = fit_on_ray(config, data.data_dir, folder, also)
                write_event(folder, "end", stopped=result["stopped"])
            except (UserError, RunFailed) as error:
                try_event(folder, "failure", message=str(error))
                raise
            finally:
                reporter.write(running=False)
            if result["stopped"] == "non_finite":
                raise _diverged(config, folder, result["message"])
    peak = round(result["peak_memory_bytes"] / 2**30, 3)
    log.info("peak memory of a worker: %.2f GiB", peak)
    return {"peak_memory_gib": peak}


def _diverged(config: Config, folder: Path, message: str) -> RunFailed:
    kept = f"The best model so far and the last good checkpoint are in {run_place(config)}. "
    clip = "a lower optim.max_grad_norm" if config.optim.max_grad_norm else "optim.max_grad_norm=1"
    return RunFailed(
        f"stopped before an update with a non-finite number ({message}). "
        f"{kept if has_model(folder) else ''}Try a lower optim.lr, a longer optim.warmup_steps or "
        f"{clip}, under another name"
    )
