"""Elastic training: repeats Ray Train's fit, with as many workers as there is room for, until done.

Ray Train's own elastic policy counts nodes' resources up to twenty seconds late, whether they are
free or about to be preempted or not, and starts more workers in the middle of a step. Here, a
placement group for each missing worker requests room from Ray, and nodes from its autoscaler; and
workers save and leave before their number changes, see `notices`.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping

import ray
import ray.train
from ray.util.placement_group import PlacementGroup

from gptray.config import ComputeConfig, Config
from gptray.jobs.cluster.cluster_nodes import (
    PLACE,
    alive_nodes,
    free_resources,
    has_labels,
    nodes_being_preempted,
)
from gptray.jobs.cluster.resources import room
from gptray.jobs.train.trainer import recurs
from gptray.wording import count

log = logging.getLogger("gptray")

# After this many seconds without a change, a start stops waiting for more room.
SETTLED_S, POLL_S = 5.0, 0.5
# Errors that Ray Train does not export.
_NOT_STARTED = (
    "InsufficientClusterResourcesError",
    "WorkerGroupStartupFailedError",
    "WorkerGroupStartupTimeoutError",
)

# After this many seconds without a change, that is all, even if more room seems free or imminent.
OVERDUE_S = 60.0
# A resource that a node has for a placement group; captures the group's id.
_OF_GROUP = re.compile(r"bundle_group_([0-9a-f]+)")

Fit = Callable[[int], dict[str, object]]


def fit_until_done(config: Config, reserved: Mapping[str, float], fit: Fit) -> dict[str, object]:
    """Call `fit(workers)` until the workers do not leave early; return its last result.

    If elastic, the number of workers is as high as there is room for. Raises WorkerGroupError if
    workers died more often than compute.max_failures, or would fail again.
    """
    if not config.compute.is_elastic:
        while (result := fit(config.compute.max_workers))["stopped"] == "left":
            pass
        return result
    return _fit_where_there_is_room(config, reserved, fit)


def _fit_where_there_is_room(
    config: Config, reserved: Mapping[str, float], fit: Fit
) -> dict[str, object]:
    most, deaths = config.compute.max_failures, 0
    while True:
        workers = workers_with_room(config, reserved)
        log.info("there is room for %s; starting", count(workers, "worker"))
        try:
            result = fit(workers)
        except ray.train.PreemptionError:
            pass  # the notice left no time to leave in order
        except ray.train.ControllerError as error:
            # Workers fail to start if, say, the node with room for them is lost meanwhile.
            if type(error.controller_failure).__name__ not in _NOT_STARTED:
                raise
        except ray.train.WorkerGroupError as error:
            deaths += not _is_preemption(error)
            if 0 <= most < deaths or recurs(error):
                raise
        else:
            if result["stopped"] != "left":
                return result


def _is_preemption(error: ray.train.WorkerGroupError) -> bool:
    """Whether a worker died with a node that was known to be preempted."""
    failures = [getattr(one, "health_check_failure", one) for one in error.worker_failures.values()]
    return any(getattr(one, "preempted", False) for one in failures)


def workers_with_room(config: Config, reserved: Mapping[str, float]) -> int:
    """Wait for room for the minimum of workers; return for how many there is room.

    All places are given back before this returns, so the room is free.
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
    """Places for future workers, which Ray holds until they are closed.

    reserved: a worker's resources, on one node. settled_s: after how many seconds without a change
    to stop waiting for more room.
    """

    def __init__(
        self, compute: ComputeConfig, reserved: Mapping[str, float], *, settled_s: float
    ) -> None:
        self._compute, self._reserved, self._settled_s = compute, dict(reserved), settled_s
        self._places: list[PlacementGroup] = []
        self._seen, self._since = (0, False), time.monotonic()
        self._job: str = ray.get_runtime_context().get_job_id()

    def ask(self, number: int) -> None:
        """Request places, up to `number` in total, from Ray, and nodes from its autoscaler."""
        labels = [self._compute.selector] if self._compute.selector else None
        while len(self._places) < number:
            name = PLACE + secrets.token_hex(8)  # names are unique in a cluster
            self._places.append(
                ray.util.placement_group([self._reserved], name=name, bundle_label_selector=labels)
            )

    def look(self) -> tuple[int, bool]:
        """How many places have been given on nodes that stay, and whether that is all for now.

        It is not all while the number changes, a node has room for one more, or Ray has yet to
        release what departed workers held.
        """
        leaving = nodes_being_preempted()
        given = sum(self._is_given(place, leaving) for place in self._places)
        seen = given, given < len(self._places) and self._may_be_more(leaving)
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        seconds = time.monotonic() - self._since
        return given, seconds >= (OVERDUE_S if seen[1] else self._settled_s)

    def close(self) -> None:
        """Give all places back."""
        for place in self._places:
            ray.util.remove_placement_group(place)
        self._places.clear()

    def _is_given(self, place: PlacementGroup, leaving: Mapping[str, float]) -> bool:
        found = ray.util.placement_group_table(place)
        return bool(found["state"] == "CREATED") and found["bundles_to_node_id"][0] not in leaving

    def _may_be_more(self, leaving: Mapping[str, float]) -> bool:
        """Whether a node that stays has, or will have, room for one more."""
        nodes = {node.id for node in alive_nodes() if has_labels(node, self._compute.selector)}
        in_use = ray.util.get_current_placement_group()  # if this is a training worker
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
