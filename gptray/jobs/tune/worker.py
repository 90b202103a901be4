"""A trial of a sweep, in the process that Ray Tune gives it: an ordinary run that reports to Tune.

A single worker trains right here, in an actor that runs one trial after another; several train in
Ray Train's workers. A failure is an outcome like any other, so that the sweep continues.
"""

from __future__ import annotations

import gc
import os
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray.train
import ray.tune
import torch
from ray.util.queue import Empty, Queue

from gptray.config import Config, RunFailed, UserError
from gptray.data.tokens import DamagedData
from gptray.jobs.cluster.connection import TRAIN_ENV
from gptray.jobs.cluster.ray_metrics import Exporter, run_tag
from gptray.jobs.train.fitting import ended, fit_in_workers
from gptray.jobs.train.node_run import RunOnNode, run_on_node
from gptray.jobs.train.samples import sample_texts
from gptray.jobs.train.task import TrialTask
from gptray.training.loop import fit

POLL_S = 0.5
# The loop's reasons to stop, and their names in a sweep's record.
OUTCOMES = {"max_steps": "finished", "patience": "patience", "non_finite": "diverged"}


def run_trial(task: TrialTask) -> dict[str, object]:
    """Train the trial's run; return the outcome, which is Tune's last report."""
    try:
        if task.run.config.compute.num_workers == 1:
            with run_on_node(task.run) as run:
                result = ended(_train_here(run))
        else:
            result = ended(_train_in_workers(task))
        task.run.note("end", stopped=result["stopped"])
    except Exception as error:
        # The next start repairs damaged prepared text, so that failure is transient, too.
        passing, message = isinstance(error, (RunFailed, OSError, DamagedData)), str(error)
        if not isinstance(error, (RunFailed, UserError)):
            message = f"{type(error).__name__}: {error}"
        with suppress(RunFailed):
            task.run.note("failure", message=message)
        return {"outcome": "failed", "message": message, "passing": passing}
    return {
        "outcome": OUTCOMES[result["stopped"]],
        "message": result.get("message"),
        "last_step": result["step"],
    }


def _train_here(run: RunOnNode) -> dict[str, object]:
    task, config = run.task, run.task.config
    data = task.tokens()
    device = torch.device("cuda" if config.compute.use_gpu else "cpu")
    _forget_trials_before(config, device)
    # This setting is per thread, and every trial runs in its own thread.
    torch.set_num_threads(task.threads)

    def report(metrics: dict[str, object], checkpoint_dir: Path | None) -> None:
        run.send()
        ray.tune.report(metrics)

    return fit(
        config,
        data,
        task.run_dir,
        report=report,
        sample=lambda model: sample_texts(config, data, model),
        device=device,
        timed=Exporter(run_tag(task.run_dir)).laps,
    )


def _forget_trials_before(config: Config, device: torch.device) -> None:
    """Free what earlier trials left in this process. The loop sets everything else itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if config.train.compiles(on_gpu=device.type != "cpu"):
        # Compiled code is cached by the model's source lines, for a limited number of shapes.
        torch.compiler.reset()


def _train_in_workers(task: TrialTask) -> dict[str, object]:
    os.environ.update({**TRAIN_ENV, **os.environ})
    reports = Queue(1, actor_options={"num_cpus": 0})  # training waits for Tune
    done = Future[dict[str, object]]()

    def train() -> None:
        try:
            # With the driver's resources, since this process does not know whose the cluster is.
            done.set_result(fit_in_workers(task.run, task.reserved, callbacks=[_Reports(reports)]))
        except BaseException as error:
            done.set_exception(error)

    # A daemon, since Tune may end the trial at a report.
    threading.Thread(target=train, name="trial", daemon=True).start()
    while True:
        is_last = done.done()  # no report comes after that
        try:
            ray.tune.report(reports.get(timeout=POLL_S))
        except Empty:
            if is_last:
                return done.result()


class _Reports(ray.train.UserCallback):  # type: ignore[misc]
    """Passes reports to the trial's thread, which reports them to Tune.

    Ray's own TuneReportCallback uses the actor's main thread, which hangs if the trial returns at
    that moment.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        self._queue.put(metrics[0])
