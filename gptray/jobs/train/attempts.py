"""Ray Train's fits until a run is through: one after the other, with the workers there is room for.

Ray Train's own elastic policy counts what nodes have, used or not and about to be taken or not, up
to twenty seconds late, and starts more workers in the middle of a step. Here a placement group for
each worker that is missing asks Ray for room, and its autoscaler for nodes; and the workers save
and leave before there are more or fewer of them, see `notices`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from gptray.config import Config
from gptray.jobs.train.room import Places
from gptray.wording import count

if TYPE_CHECKING:
    import ray.train

log = logging.getLogger("gptray")

# Seconds without a change after which there is as much room as there will be at a start.
SETTLED_S, POLL_S = 5.0, 0.5
# Ray Train's own errors, which it does not export.
_NOT_STARTED = (
    "InsufficientClusterResourcesError",
    "WorkerGroupStartupFailedError",
    "WorkerGroupStartupTimeoutError",
)

Fit = Callable[[int], dict[str, object]]


def fit_until_done(config: Config, reserved: Mapping[str, float], fit: Fit) -> dict[str, object]:
    """The last result of `fit(workers)`, which is called again for as long as the workers leave.

    Of an elastic number of workers there are as many as there is room for.

    Raises:
        ray.train.WorkerGroupError: workers died more often than compute.max_failures.
    """
    if not config.compute.is_elastic:
        while (result := fit(config.compute.max_workers))["stopped"] == "left":
            pass
        return result
    return _fit_where_there_is_room(config, reserved, fit)


def _fit_where_there_is_room(
    config: Config, reserved: Mapping[str, float], fit: Fit
) -> dict[str, object]:
    import ray.train

    most, deaths = config.compute.max_failures, 0
    while True:
        workers = workers_with_room(config, reserved)
        log.info("there is room for %s: starting", count(workers, "worker"))
        try:
            result = fit(workers)
        except ray.train.PreemptionError:
            pass  # announced, and no time to leave
        except ray.train.ControllerError as error:
            if not _is_of_lost_room(error):
                raise
        except ray.train.WorkerGroupError as error:
            deaths += not _is_of_taken_node(error)
            if 0 <= most < deaths:
                raise
        else:
            if result["stopped"] != "left":
                return result


def _is_of_lost_room(error: ray.train.ControllerError) -> bool:
    """Whether workers did not start, as when a node that had room for them is lost by then."""
    return type(error.controller_failure).__name__ in _NOT_STARTED


def _is_of_taken_node(error: ray.train.WorkerGroupError) -> bool:
    """Whether a worker died with a node of which it was known that it would be taken."""
    failures = [getattr(one, "health_check_failure", one) for one in error.worker_failures.values()]
    return any(getattr(one, "preempted", False) for one in failures)


def workers_with_room(config: Config, reserved: Mapping[str, float]) -> int:
    """Wait for room for the least workers; for how many there is some.

    The room is free when this returns: no place is left for which Ray would keep it.
    """
    least, most = config.compute.min_workers, config.compute.max_workers
    places = Places(config.compute, reserved, settled_s=SETTLED_S)
    try:
        places.ask(most)
        while True:
            given, is_settled = places.look()
            if given == most or (given >= least and is_settled):
                return given
            time.sleep(POLL_S)
    finally:
        places.close()
