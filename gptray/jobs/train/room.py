"""Room for workers to come, of which Ray is asked to keep some for each."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gptray.config import ComputeConfig
from gptray.jobs.cluster_nodes import (
    alive_nodes,
    free_resources_by_node,
    has_labels,
    nodes_to_be_taken,
)
from gptray.jobs.resources import room

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

# How the names of placement groups begin that keep a place for a worker to come.
PLACE = "gptray-place-"
# Seconds without a change after which that is all, even where more seems to be free or about to be.
OVERDUE_S = 60.0
# What a node has for a placement group, whose id this finds.
_OF_GROUP = re.compile(r"bundle_group_([0-9a-f]+)")


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
        for node, free in free_resources_by_node().items():
            if node in leaving or node not in nodes:
                continue
            if room(self._compute, [free], self._reserved["CPU"]):
                return True
            groups = {found[1] for name in free if (found := _OF_GROUP.fullmatch(name))}
            if any(group.endswith(self._job) for group in groups - known):
                return True
        return False
