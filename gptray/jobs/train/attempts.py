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
# Seconds in which places show up that are free, once there are enough to start.
SETTLE_S, POLL_S = 5.0, 0.5

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

    places, most, deaths = Places(config, reserved), config.compute.max_failures, 0
    try:
        while True:
            try:
                result = fit(places.take())
            except ray.train.PreemptionError:
                pass  # announced, and no time to leave
            except ray.train.WorkerGroupError as error:
                deaths += not _is_of_taken_node(error)
                if 0 <= most < deaths:
                    raise
            else:
                if result["stopped"] != "left":
                    return result
    finally:
        places.close()


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


class Places:
    """A placement group for each worker that does not run, and for the one that scores."""

    def __init__(self, config: Config, reserved: Mapping[str, float]) -> None:
        self._compute, self._reserved = config.compute, dict(reserved)
        self._spare = int(config.train.async_validation)
        self._groups: list[PlacementGroup] = []

    def take(self) -> int:
        """Wait for room for the least workers; for how many there is some, which is given free."""
        import ray

        least = self._compute.min_workers + self._spare
        most = self._compute.max_workers + self._spare
        while len(self._groups) < most:
            self._groups.append(place_for([self._reserved], self._compute))
        settled = time.monotonic() + SETTLE_S
        while True:
            ready = [group for group in self._groups if is_given(group)]
            if len(ready) == most or (len(ready) >= least and time.monotonic() > settled):
                break
            time.sleep(POLL_S)
        for group in ready:
            ray.util.remove_placement_group(group)
            self._groups.remove(group)
        return len(ready) - self._spare

    def close(self) -> None:
        """Ask for no more places."""
        import ray

        for group in self._groups:
            ray.util.remove_placement_group(group)
