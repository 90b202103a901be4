"""Ray Train without the actors that a run here has no use for, and with a cleaner that works.

Each actor is a process, which takes a second of two cores at every start.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from gptray.jobs.cluster_nodes import HEAD
from gptray.jobs.own_ray import is_own_ray

# Hands out Ray Data's datasets, of which there are none here: workers open their tokens themselves.
DATASETS = "DatasetsCallback"
# Gives back the places of workers whose controller is gone, if there is a dashboard: see `Cleaner`.
CLEANER = "PlacementGroupCleanerCallback"
POLL_S = 0.5


def fitted(*given: Any, **named: Any) -> Any:
    """`DataParallelTrainer(...).fit()` without datasets; leaner still on the job's own Ray."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class Trainer(DataParallelTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            kept = []
            for one in super()._create_default_callbacks():
                name = type(one).__name__
                # The job's own Ray ends with it; a trial of a sweep ends before its Ray.
                if name == CLEANER and not is_own_ray():
                    kept.append(_with_own_cleaner(type(one)))
                elif name not in (CLEANER, DATASETS):
                    kept.append(one)
            return kept

        def _initialize_and_run_controller(self, **given: Any) -> Any:
            if is_own_ray():
                # There is no autoscaler to tell what the workers need.
                vars(given["scaling_policy"]).update(
                    after_controller_start=_nothing, _maybe_send_resource_request=_nothing
                )
            return super()._initialize_and_run_controller(**given)

    return Trainer(*given, **named).fit()


def _with_own_cleaner(base: type) -> object:
    """Ray's callback, whose class is given, with a `Cleaner` in the place of Ray's actor."""
    import ray

    class Callback(base):  # type: ignore[misc]
        def after_controller_start(self, train_run_context: object) -> None:
            context = ray.get_runtime_context()
            self._controller_actor_id = context.get_actor_id()
            actor = ray.remote(num_cpus=0)(Cleaner).options(
                lifetime="detached",  # it is to outlive the controller, and the trial's own group
                resources={HEAD: 0.001},
                scheduling_strategy="DEFAULT",
            )
            self._cleaner = actor.remote(context.current_actor)
            self._cleaner.start_monitoring.remote()

    return Callback()


class Cleaner:
    """An actor that gives the workers' placement group back once their controller is gone.

    Without it the group is held until the job ends. Ray's own, in whose place it is called, asks
    the dashboard whether the controller lives; where none runs it gives nothing back, and its end
    takes ten seconds.
    """

    def __init__(self, controller: Any) -> None:
        self._controller, self._group = controller, None

    def start_monitoring(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def register_placement_group(self, group: Any) -> None:
        """The group of the workers that the controller has now."""
        self._group = group

    def stop(self) -> None:
        """End, for the controller gives its group back itself."""
        import ray

        ray.actor.exit_actor()

    def _watch(self) -> None:
        import ray

        own = ray.get_runtime_context().current_actor
        try:
            while True:
                ray.get(self._controller.__ray_ready__.remote())
                time.sleep(POLL_S)
        except ray.exceptions.RayActorError:
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
        finally:
            ray.kill(own)


def _nothing(*given: object) -> None:
    pass
