"""Has Ray Train run a training's workers, and says in a sentence why they failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    ValidationConfig,
    ValidationTaskConfig,
    WorkerGroupError,
)
from ray.train.backend import BackendConfig

from gptray.config import Config, RunFailed
from gptray.config.errors import WorkerFailed
from gptray.jobs.cluster.connection import ray_answers
from gptray.jobs.cluster.own_ray import is_own_ray
from gptray.jobs.cluster.ray_messages import why_ended
from gptray.jobs.cluster.resources import actor_options, worker_resources
from gptray.jobs.cluster.tasks import Failure
from gptray.jobs.folders.origin import reachable
from gptray.jobs.folders.run_folder import set_ray_snapshot_aside
from gptray.jobs.train.attempts import fit_until_done
from gptray.jobs.train.process_entries import begin_validation, begin_worker
from gptray.jobs.train.task import TrainTask
from gptray.jobs.train.trainer import FailureNotes, Trainer
from gptray.storage.files import cannot_write, is_file_error, storing


def fit_on_ray(
    config: Config, data_dir: Path, folder: Path, also: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """Like `fit_in_workers`, giving each worker its share of the cluster."""
    reserved = worker_resources(config.compute, spare=spare_workers(config), together=True)
    threads = max(1, int(reserved["CPU"]))
    with reachable(config, folder) as origin:
        task = TrainTask(
            config,
            data_dir,
            folder,
            threads,
            may_lose_nodes=not is_own_ray(),
            origin=origin,
            also=also or {},
        )
        return fit_in_workers(task, reserved)


def fit_in_workers(
    task: TrainTask, reserved: Mapping[str, float], *, callbacks: Sequence[Any] = ()
) -> dict[str, Any]:
    """Train in Ray Train's workers; return the loop's result. `callbacks` are Ray Train's.

    Raises UserError or RunFailed like `ray_failures`.
    """
    config, folder, compute = task.config, task.folder_here, task.config.compute

    def fit(workers: int) -> dict[str, object]:
        set_ray_snapshot_aside(folder)  # it may name checkpoints that have been pruned
        trainer = Trainer(
            begin_worker,
            train_loop_config={"task": task, "ray_dir": folder},
            # A single worker needs no process group, and Ray's backend takes seconds to start.
            backend_config=_nccl() if compute.use_gpu and workers > 1 else None,
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=compute.use_gpu,
                resources_per_worker=dict(reserved),
                label_selector=compute.selector or None,
            ),
            run_config=RunConfig(
                name=folder.name,
                storage_path=str(folder.parent),
                failure_config=FailureConfig(
                    max_failures=0 if compute.is_elastic else compute.max_failures,
                    max_preemption_failures=0 if compute.is_elastic else -1,
                    controller_failure_limit=0 if compute.is_elastic else -1,
                ),
                callbacks=[FailureNotes(task), *callbacks],
            ),
            validation_config=_validation_config(task, reserved),
        )
        result: dict[str, object] = trainer.fit().return_value
        return result

    with ray_failures(config, folder):
        return ended(fit_until_done(config, reserved, fit))


def spare_workers(config: Config) -> int:
    """How many workers are needed besides those that train."""
    return int(config.train.async_validation)


def ended(result: dict[str, Any]) -> dict[str, Any]:
    """The loop's result. Raises the UserError or RunFailed that ended it."""
    if result["stopped"] == "failed":
        raise Failure(result["message"], result["mistake"]).error()
    return result


def _validation_config(task: TrainTask, reserved: Mapping[str, float]) -> ValidationConfig | None:
    """With train.async_validation, have Ray Train score each checkpoint in its own process."""
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
    try:
        with ray_answers(), storing(folder):  # Ray writes its own record there
            yield
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if isinstance(failure, WorkerFailed):
                raise RunFailed(str(failure)) from None
        raise RunFailed(
            f"the workers failed more than compute.max_failures={config.compute.max_failures} "
            "times; the same command resumes from the last checkpoint.\n"
            f"{why_ended(error, otherwise=str(error))}"
        ) from None
    except ControllerError as error:
        if is_file_error(error.controller_failure):
            raise cannot_write(folder, error.controller_failure) from None
        most = f"dies more than compute.max_failures={config.compute.max_failures} times"
        guess = f", which happens when the process that scores checkpoints {most}"
        raise RunFailed(
            f"Ray Train's controller failed{guess if config.train.async_validation else ''}; the "
            f"same command resumes from the last checkpoint.\n{error.controller_failure}"
        ) from None
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        why = why_ended(error, otherwise="")
        raise RunFailed(
            f"Ray Train's controller died{f': {why}' if why else ', killed or out of memory'}; "
            "the same command resumes from the last checkpoint"
        ) from None


def _nccl() -> BackendConfig:
    from ray.train.torch import TorchConfig  # imports torch, which the driver needs only here

    return TorchConfig(backend="nccl")
