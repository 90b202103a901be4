"""Ray Train without the actors and retries that runs here do not need, and with a working cleaner.

Each actor is a process, which takes a second of two cores at every start.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import PlacementGroup

from gptray.config import RunFailed
from gptray.config.errors import WorkerFailed
from gptray.jobs.cluster.cluster_nodes import HEAD
from gptray.jobs.cluster.own_ray import is_own_ray
from gptray.jobs.cluster.ray_messages import why_ended
from gptray.jobs.train.task import TrainTask
from gptray.signals import is_handling

# Hands out Ray Data datasets, which are not used here: workers open their tokens themselves.
DATASETS = "DatasetsCallback"
# Frees the placement group of workers whose controller is gone, given a dashboard; see `Cleaner`.
CLEANER = "PlacementGroupCleanerCallback"
POLL_S = 0.5
# How long an interrupted call waits for its workers to end.
ABORT_S = 10.0


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train's trainer without datasets, and on the job's own Ray without more.

    Workers start again unless they would fail again, see `recurs`. Ctrl-C raises KeyboardInterrupt,
    now and later: Ray's own handler would outlive the run, and end the process.
    """

    _controller: ray.actor.ActorHandle | None = None

    def _create_default_callbacks(self) -> list[Any]:
        kept = []
        for one in super()._create_default_callbacks():
            name = type(one).__name__
            # The job's own Ray ends with the job, so it needs no cleaner.
            if name == CLEANER and not is_own_ray():
                kept.append(_with_own_cleaner(type(one)))
            elif name not in (CLEANER, DATASETS):
                kept.append(one)
        return kept

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        policy = given["failure_policy"]
        vars(policy).update(_is_retryable_error=partial(_may_pass, policy._is_retryable_error))
        if is_own_ray():
            # There is no autoscaler to request resources from.
            vars(given["scaling_policy"]).update(
                after_controller_start=_nothing, _maybe_send_resource_request=_nothing
            )
        try:
            return super()._initialize_and_run_controller(**given)
        except KeyboardInterrupt:
            # A job's process ends now, and its workers with it; another one may go on.
            if self._controller is not None and not is_handling():
                with suppress(ray.exceptions.RayError):  # the controller ends without an answer
                    ray.get(self._controller.abort.remote(), timeout=ABORT_S)
            raise

    def _register_sigint_handler(self, controller: ray.actor.ActorHandle) -> None:
        self._controller = controller


def recurs(error: Exception) -> bool:
    """Whether workers would fail again: one of them said why it cannot go on."""
    failures = getattr(error, "worker_failures", {}).values()
    return any(isinstance(one, WorkerFailed) for one in failures)


def _may_pass(is_retryable: Callable[[Exception], bool], error: Exception) -> bool:
    return not recurs(error) and is_retryable(error)


def _with_own_cleaner(base: type) -> object:
    """Ray's callback, of class `base`, with a `Cleaner` instead of Ray's actor."""

    class Callback(base):  # type: ignore[misc]
        def after_controller_start(self, train_run_context: object) -> None:
            context = ray.get_runtime_context()
            self._controller_actor_id = context.get_actor_id()
            actor = ray.remote(num_cpus=0)(Cleaner).options(
                lifetime="detached",  # to outlive the controller, and the trial's own group
                resources={HEAD: 0.001},
                scheduling_strategy="DEFAULT",
            )
            self._cleaner = actor.remote(context.current_actor)
            self._cleaner.start_monitoring.remote()

    return Callback()


class Cleaner:
    """An actor that frees the workers' placement group once their controller is gone.

    Without it, the group is held until the job ends. Ray's own cleaner, which this replaces, asks
    the dashboard whether the controller is alive; without a dashboard it frees nothing and takes
    ten seconds to end.
    """

    def __init__(self, controller: ActorHandle[object]) -> None:
        self._controller = controller
        self._group: PlacementGroup | None = None

    def start_monitoring(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def register_placement_group(self, group: PlacementGroup) -> None:
        """Note the placement group of the controller's current workers."""
        self._group = group

    def stop(self) -> None:
        """End, since the controller frees its group itself."""
        ray.actor.exit_actor()

    def _watch(self) -> None:
        own = ray.get_runtime_context().current_actor
        try:
            while True:
                ray.get(self._controller.__ray_ready__.remote())
                time.sleep(POLL_S)
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
        finally:
            ray.kill(own)


class FailureNotes(ray.train.UserCallback):  # type: ignore[misc]
    """Runs in Ray Train's controller, and notes workers' failures in the run for the watcher."""

    def __init__(self, task: TrainTask) -> None:
        self._task = task

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        ranks = ", ".join(str(rank) for rank in sorted(worker_exceptions))
        why = why_ended(next(iter(worker_exceptions.values())))
        with suppress(RunFailed):
            self._task.note("failure", message=f"worker {ranks} failed: {why}")


def _nothing(*given: object) -> None:
    pass
