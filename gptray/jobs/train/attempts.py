"""Ray Train's fits until a run is through: one after the other, with the workers there is room for.

Ray Train's own elastic policy counts what nodes have, used or not and about to be taken or not, up
to twenty seconds late, and starts more workers in the middle of a step. Here a placement group for
each worker that is missing asks Ray for room, and its autoscaler for nodes; and the workers save
and leave before there are more or fewer of them, see `notices`.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from gptray.config import ComputeConfig, Config
from gptray.jobs.cluster_nodes import alive_nodes, free_resources, has_labels, nodes_to_be_taken
from gptray.jobs.resources import room
from gptray.wording import count

if TYPE_CHECKING:
    import ray.train
    from ray.util.placement_group import PlacementGroup

log = logging.getLogger("gptray")

# Seconds without a change after which there is as much room as there will be at a start.
SETTLED_S, POLL_S = 5.0, 0.5
# Ray Train's own errors, which it does not export.
_NOT_STARTED = (
    "InsufficientClusterResourcesError",
    "WorkerGroupStartupFailedError",
    "WorkerGroupStartupTimeoutError",
)

# How the names of placement groups begin that keep a place for a worker to come.
PLACE = "gptray-place-"
# Seconds without a change after which that is all, even where more seems to be free or about to be.
OVERDUE_S = 60.0
# What a node has for a placement group, whose id this finds.
_OF_GROUP = re.compile(r"bundle_group_([0-9a-f]+)")

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
        log.info("there is room for %s; starting", count(workers, "worker"))
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
    """Whether a worker died with a node that was known to be taken."""
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


class Places:
    """Places for workers to come. Ray keeps those that it has given until they are closed.

    reserved: what a worker needs, on one node. settled_s: seconds without a change after which
    there is as much room as there will be for now.
    """

    def __init__(
        self, compute: ComputeConfig, reserved: Mapping[str, float], *, settled_s: float
    ) -> None:
        import ray

        self._compute, self._reserved, self._settled_s = compute, dict(reserved), settled_s
        self._places: list[PlacementGroup] = []
        self._seen, self._since = (0, False), time.monotonic()
        self._job: str = ray.get_runtime_context().get_job_id()

    def ask(self, number: int) -> None:
        """Ask Ray for so many places in all, and its autoscaler for nodes."""
        import ray

        labels = [self._compute.selector] if self._compute.selector else None
        while len(self._places) < number:
            name = PLACE + secrets.token_hex(8)  # a name stands once in a cluster
            self._places.append(
                ray.util.placement_group([self._reserved], name=name, bundle_label_selector=labels)
            )

    def look(self) -> tuple[int, bool]:
        """How many places are given, on nodes that stay; whether that is all for now.

        It is not while it changes, while a node has room for one more, or while Ray has not given
        back what workers held that have left.
        """
        leaving = nodes_to_be_taken()
        given = sum(self._is_given(place, leaving) for place in self._places)
        seen = given, given < len(self._places) and self._may_be_more(leaving)
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        seconds = time.monotonic() - self._since
        return given, seconds >= (OVERDUE_S if seen[1] else self._settled_s)

    def close(self) -> None:
        """Give all places back."""
        import ray

        for place in self._places:
            ray.util.remove_placement_group(place)
        self._places.clear()

    def _is_given(self, place: PlacementGroup, leaving: Mapping[str, float]) -> bool:
        import ray

        found = ray.util.placement_group_table(place)
        return bool(found["state"] == "CREATED") and found["bundles_to_node_id"][0] not in leaving

    def _may_be_more(self, leaving: Mapping[str, float]) -> bool:
        """Whether a node that stays has room for one more, or will have."""
        import ray

        nodes = {node.id for node in alive_nodes() if has_labels(node, self._compute.selector)}
        in_use = ray.util.get_current_placement_group()  # of a worker that trains
        known = {group.id.hex() for group in [*self._places, *([in_use] if in_use else [])]}
        for node, free in free_resources().items():
            if node in leaving or node not in nodes:
                continue
            if room(self._compute, [free], self._reserved["CPU"]):
                return True
            groups = {found[1] for name in free if (found := _OF_GROUP.fullmatch(name))}
            if any(group.endswith(self._job) for group in groups - known):
                return True
        return False
