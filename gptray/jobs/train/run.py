"""The train job: Ray Train runs `gptray.training.loop.fit` in data-parallel workers.

The driver prepares the text, shows progress and reports the outcome; each worker runs the loop on
its share of the cores or on its GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptray.config import Config, RunFailed, UserError, expect_config
from gptray.config.errors import WorkerFailed
from gptray.files import cannot_write, is_file_error, storing
from gptray.jobs.base import Job
from gptray.jobs.cluster.connection import NO_SPARE_WORKERS, ray_answers, ray_cluster
from gptray.jobs.cluster.own_ray import is_own_ray
from gptray.jobs.cluster.ray_messages import why_ended
from gptray.jobs.cluster.resources import actor_options, check_cluster, worker_resources
from gptray.jobs.cluster.shared_storage import check_shared_by_training
from gptray.jobs.cluster.tasks import Failure
from gptray.jobs.folders.driver_lock import held
from gptray.jobs.folders.origin import reachable
from gptray.jobs.folders.remote_run import publishing
from gptray.jobs.folders.resuming import command, how_to_train_longer, save_config
from gptray.jobs.folders.run_folder import outcome, seen_at, set_ray_snapshot_aside
from gptray.jobs.models import CONFIG, has_model
from gptray.jobs.next_steps import resumable, tell_run
from gptray.jobs.other_texts import prepared_also
from gptray.jobs.prepare.run import stored_text
from gptray.jobs.progress.reporter import Reporter
from gptray.jobs.progress.tracking import tracking_run
from gptray.jobs.train.attempts import fit_until_done
from gptray.jobs.train.check import BUSY, CheckedTraining, check, check_data, plan
from gptray.jobs.train.given_models import trained_facts
from gptray.jobs.train.process_entries import begin_validation, begin_worker
from gptray.jobs.train.task import TrainTask
from gptray.jobs.train.trainer import fitted
from gptray.jobs.train.watch import show_end, watching
from gptray.record import try_event, write_event

if TYPE_CHECKING:
    import ray.train
    from ray.train.torch import TorchConfig

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
    resumes = partial(command, "train", config, folder)
    last = config.train.max_steps
    with (
        held(folder, busy=BUSY.format(seen_at(config))),
        publishing(config, folder) as publish,
        resumable(folder, resumes, begun=folder / CONFIG, steps=last, seen=seen_at(config)),
    ):
        log.info("run %s", seen_at(config))
        reporter = Reporter(folder, seen_at(config))
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
        check_cluster(config.compute, spare=_spare(config))
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
    kept = f"The best model so far and the last good checkpoint are in {seen_at(config)}. "
    clip = "a lower optim.max_grad_norm" if config.optim.max_grad_norm else "optim.max_grad_norm=1"
    return RunFailed(
        f"stopped before an update with a non-finite number ({message}). "
        f"{kept if has_model(folder) else ''}Try a lower optim.lr, a longer optim.warmup_steps or "
        f"{clip}, under another name"
    )


def fit_on_ray(
    config: Config, data_dir: Path, folder: Path, also: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """Like `fit_in_workers`, giving each worker its share of the cluster."""
    reserved = worker_resources(config.compute, spare=_spare(config), together=True)
    threads = max(1, int(reserved["CPU"]))
    with reachable(config, folder) as origin:
        lent = not is_own_ray()
        task = TrainTask(config, data_dir, folder, threads, lent, origin, also or {})
        return fit_in_workers(task, reserved)


def fit_in_workers(
    task: TrainTask, reserved: Mapping[str, float], *, callbacks: Sequence[Any] = ()
) -> dict[str, Any]:
    """Train in Ray Train's workers; return the loop's result. `callbacks` are Ray Train's.

    Raises UserError or RunFailed like `ray_failures`.
    """
    import ray.train

    config, folder, compute = task.config, task.folder_here, task.config.compute

    def fit(workers: int) -> dict[str, object]:
        set_ray_snapshot_aside(folder)  # it may name checkpoints that have been pruned
        result: dict[str, object] = fitted(
            begin_worker,
            train_loop_config={"task": task, "ray_dir": folder},
            # A single worker needs no process group, and Ray's backend takes seconds to start.
            backend_config=_nccl() if compute.use_gpu and workers > 1 else None,
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=compute.use_gpu,
                resources_per_worker=dict(reserved),
                label_selector=compute.selector or None,
            ),
            run_config=ray.train.RunConfig(
                name=folder.name,
                storage_path=str(folder.parent),
                failure_config=ray.train.FailureConfig(
                    max_failures=0 if compute.is_elastic else compute.max_failures,
                    max_preemption_failures=0 if compute.is_elastic else -1,
                    controller_failure_limit=0 if compute.is_elastic else -1,
                ),
                callbacks=[_failure_notes(task), *callbacks],
            ),
            validation_config=_validation_config(task, reserved),
        ).return_value
        return result

    with ray_failures(config, folder):
        return ended(fit_until_done(config, reserved, fit))


def _spare(config: Config) -> int:
    """How many workers are needed besides those that train."""
    return int(config.train.async_validation)


def ended(result: dict[str, Any]) -> dict[str, Any]:
    """The loop's result. Raises the UserError or RunFailed that ended it."""
    if result["stopped"] == "failed":
        raise Failure(result["message"], result["mistake"]).error()
    return result


def _validation_config(
    task: TrainTask, reserved: Mapping[str, float]
) -> ray.train.ValidationConfig | None:
    """With train.async_validation, have Ray Train score each checkpoint in its own process."""
    from ray.train import ValidationConfig, ValidationTaskConfig

    if not task.config.train.async_validation:
        return None
    compute = task.config.compute
    return ValidationConfig(
        fn=begin_validation,
        task_config=ValidationTaskConfig(fn_kwargs={"task": task}),
        ray_remote_kwargs={**actor_options(compute, reserved), "max_retries": compute.max_failures},
    )


@contextmanager
def ray_failures(config: Config, folder: Path) -> Iterator[None]:
    """Turn Ray Train's exceptions, and those of writing to the folder, into a RunFailed."""
    import ray.train

    try:
        with ray_answers(), storing(folder):  # Ray writes its own record there
            yield
    except ray.train.WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if isinstance(failure, WorkerFailed):
                raise RunFailed(str(failure)) from None
        raise RunFailed(
            f"the workers failed more than compute.max_failures={config.compute.max_failures} "
            "times; the same command resumes from the last checkpoint.\n"
            f"{why_ended(error, otherwise=str(error))}"
        ) from None
    except ray.train.ControllerError as error:
        if is_file_error(error.controller_failure):
            raise cannot_write(folder, error.controller_failure) from None
        raise RunFailed(
            "Ray Train's controller failed, which happens when the process that scores "
            f"checkpoints dies more than compute.max_failures={config.compute.max_failures} "
            "times; the same command resumes from the last "
            f"checkpoint.\n{error.controller_failure}"
        ) from None
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        why = why_ended(error, otherwise="")
        raise RunFailed(
            f"Ray Train's controller died{f': {why}' if why else ', killed or out of memory'}; "
            "the same command resumes from the last checkpoint"
        ) from None


def _nccl() -> TorchConfig:
    from ray.train.torch import TorchConfig

    return TorchConfig(backend="nccl")


def _failure_notes(task: TrainTask) -> Any:
    """A callback that Ray Train's controller runs, which notes worker failures for the watcher."""
    from ray.train import UserCallback

    class FailureNotes(UserCallback):  # type: ignore[misc]
        def after_exception(
            self, run_context: Any, worker_exceptions: dict[int, Exception]
        ) -> None:
            ranks = ", ".join(str(rank) for rank in sorted(worker_exceptions))
            why = why_ended(next(iter(worker_exceptions.values())))
            with suppress(RunFailed):
                task.note("failure", message=f"worker {ranks} failed: {why}")

    return FailureNotes()


JOB = Job(check, plan, run)
