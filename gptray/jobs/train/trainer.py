"""Ray Train's trainer, without the actors that a run here has no use for.

Each actor is a process, which takes a second of two cores at every start.
"""

from __future__ import annotations

import logging
from typing import Any

from gptray.jobs.cluster import sigterm_kept
from gptray.jobs.own_ray import is_own_ray

# Hands out Ray Data's datasets, of which there are none here: workers open their tokens themselves.
DATASETS = "DatasetsCallback"
# Gives back a dead controller's placement group, for the jobs after it. It asks the dashboard
# whether the controller lives: without one it gives back nothing, and takes ten seconds to end.
CLEANER = "PlacementGroupCleanerCallback"


def fitted(*given: Any, **named: Any) -> Any:
    """`DataParallelTrainer(...).fit()` without what this cluster has no use for."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class Trainer(DataParallelTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            is_lean = is_own_ray() or not _has_dashboard()
            unused = {DATASETS, CLEANER} if is_lean else {DATASETS}
            callbacks = super()._create_default_callbacks()
            return [one for one in callbacks if type(one).__name__ not in unused]

        def _initialize_and_run_controller(self, **given: Any) -> Any:
            if is_own_ray():
                # There is no autoscaler to tell what the workers need.
                vars(given["scaling_policy"]).update(
                    after_controller_start=_nothing, _maybe_send_resource_request=_nothing
                )
            return super()._initialize_and_run_controller(**given)

    return Trainer(*given, **named).fit()


def _has_dashboard() -> bool:
    """Whether the cluster that this process is connected to has one; true for a Ray client."""
    import ray

    if ray.util.client.ray.is_connected():  # ray.init would start another
        return True
    with sigterm_kept():
        context = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)
    return bool(context.dashboard_url)


def _nothing(*given: object) -> None:
    pass
