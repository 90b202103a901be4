"""Ray Train's fits until a run is through: one after the other, with the workers there is room for.

Ray Train's own elastic policy counts what nodes have, used or not and about to be taken or not, up
to twenty seconds late, and starts more workers in the middle of a step. Here a placement group for
each worker that is missing asks Ray for room, and its autoscaler for nodes; and the workers save
and leave before there are more or fewer of them, see `notices`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from gptray.config import ComputeConfig, Config

if TYPE_CHECKING:
    import ray.train
    from ray.util.placement_group import PlacementGroup

# How the names of placement groups begin that keep a place for a worker to come.
PLACE = "gptray-place-"
# Seconds in which places show up that are free, once there are enough to start: at first, and after
# workers have left, whose own places Ray gives back late.
SETTLE_S, SETTLE_AGAIN_S, POLL_S = 5.0, 15.0, 0.5

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

    most, deaths, settle_s = config.compute.max_failures, 0, SETTLE_S
    while True:
        workers = workers_with_room(config, reserved, settle_s)
        settle_s = SETTLE_AGAIN_S
        try:
            result = fit(workers)
        except ray.train.PreemptionError:
            pass  # announced, and no time to leave
        except ray.train.WorkerGroupError as error:
            deaths += not _is_of_taken_node(error)
            if 0 <= most < deaths:
                raise
        else:
            if result["stopped"] != "left":
                return result


def _is_of_taken_node(error: ray.train.WorkerGroupError) -> bool:
    """Whether a worker died with a node of which it was known that it would be taken."""
    failures = [getattr(one, "health_check_failure", one) for one in error.worker_failures.values()]
    return any(getattr(one, "preempted", False) for one in failures)


def place_for(bundles: list[dict[str, float]], compute: ComputeConfig) -> PlacementGroup:
    """Ask Ray for a place for workers to come, and its autoscaler for nodes."""
    import ray

    labels = [compute.selector] * len(bundles) if compute.selector else None
    name = PLACE + secrets.token_hex(8)  # a name stands once in a cluster
    return ray.util.placement_group(bundles, name=name, bundle_label_selector=labels)


def is_given(place: PlacementGroup) -> bool:
    """Whether a node has given what a placement group asks for."""
    import ray

    return bool(ray.util.placement_group_table(place)["state"] == "CREATED")


def workers_with_room(config: Config, reserved: Mapping[str, float], settle_s: float) -> int:
    """Wait for room for the least workers, and the one that scores; for how many there is some.

    settle_s: seconds in which there may come to be room for more.
    The room is free when this returns: no place is left for which Ray would keep it.
    """
    import ray

    compute, spare = config.compute, int(config.train.async_validation)
    least, most = compute.min_workers + spare, compute.max_workers + spare
    places = [place_for([dict(reserved)], compute) for _ in range(most)]
    try:
        settled = time.monotonic() + settle_s
        while True:
            given = sum(map(is_given, places))
            if given == most or (given >= least and time.monotonic() > settled):
                return given - spare
            time.sleep(POLL_S)
    finally:
        for place in places:
            ray.util.remove_placement_group(place)
