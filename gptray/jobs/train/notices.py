"""Why training workers leave their places, each after a checkpoint of the step at hand.

A cloud takes a node with a notice of some seconds or minutes, which Ray keeps as a drain of the
node. Or somebody ends a worker by SIGTERM. Or there is room for more workers.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

import ray
import ray.train

from gptray.jobs.cluster_nodes import nodes_to_be_taken
from gptray.jobs.train.attempts import PLACE, place_for
from gptray.jobs.train.task import TrainTask
from gptray.record import try_event
from gptray.training.numbers import Wish
from gptray.wording import count

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

log = logging.getLogger("gptray")

POLL_S = 1.0
# Seconds to spare when training goes on until a node is taken, besides twice the longest step.
SPARE_S = 5.0
# Seconds for which there is room for more workers before they start: all start again for it.
GROW_S = 10.0

_sigterm = threading.Event()


def _heed_sigterm() -> None:
    """Note a SIGTERM to this process, of which it would die by Ray's own handler."""
    signal.signal(signal.SIGTERM, lambda number, frame: _sigterm.set())


class Notices:
    """What one worker wishes of all. As a context; the first worker watches the cluster in it."""

    def __init__(self, task: TrainTask) -> None:
        self._task = task
        context = ray.train.get_context()
        self._is_first = context.get_world_rank() == 0
        self._missing = task.config.compute.max_workers - context.get_world_size()
        self._has_saved = False
        self._last, self._longest_s = time.monotonic(), 0.0
        self._reason = "a worker got SIGTERM"
        self._taken_at: float | None = None  # when the first node that is to be taken will be
        self._has_asked = False  # for places for the workers on such nodes
        self._places: list[PlacementGroup] = []
        self._room_since: float | None = None  # when there was first room for more workers
        self._is_to_leave = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="notices", daemon=True)

    def __enter__(self) -> Notices:
        if self._task.may_lose_nodes:
            # Handlers can be set in the main thread alone, where the actor's methods run.
            ray.get(ray.get_runtime_context().current_actor.execute.remote(_heed_sigterm))
            if self._is_first:
                self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()

    def wish(self) -> Wish:
        """What this worker wishes at this step; called at each."""
        now = time.monotonic()
        self._longest_s, self._last = max(self._longest_s, now - self._last), now
        if self._is_to_leave or _sigterm.is_set():
            return Wish.LEAVE
        if self._taken_at is None:
            return Wish.NONE
        left_s = self._taken_at - time.time()
        if left_s < 2 * self._longest_s + SPARE_S:
            return Wish.LEAVE
        if self._has_saved:
            return Wish.NONE
        self._has_saved = True
        self._tell(f"{self._reason} in {left_s:.0f} s; the run is saved, and trains until then")
        return Wish.SAVE

    def tell_of_leaving(self, step: int) -> None:
        """Say why the workers have left at a step."""
        self._tell(f"saved at step {step:,} to start the workers again: {self._reason}")

    def _tell(self, message: str) -> None:
        if self._is_first:
            try_event(self._task.run_dir, "notice", message=message)

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            try:
                self._look()
            except Exception as error:  # Ray does not answer; the next look may succeed
                log.warning("looking for nodes that will be taken: %s", error)
        for place in self._places:
            ray.util.remove_placement_group(place)

    def _look(self) -> None:
        """Note nodes that will be taken, and whether there is room elsewhere or for more."""
        group = ray.util.get_current_placement_group()
        assert group
        places = ray.util.placement_group_table(group)
        if leaving := nodes_to_be_taken():
            lost = {
                number: node
                for number, node in places["bundles_to_node_id"].items()
                if node in leaving
            }
            if lost:
                self._move([places["bundles"][number] for number in lost])
                self._reason = f"{count(len({*lost.values()}), 'node')} will be taken"
                self._taken_at = min(leaving[node] for node in lost.values())
                return
        if self._task.config.compute.is_elastic:
            self._grow(places["bundles"][0])

    def _move(self, bundles: list[dict[str, float]]) -> None:
        """Leave as soon as there is room elsewhere, for which Ray is asked."""
        if not self._has_asked:
            self._has_asked = True
            self._places.append(place_for(bundles, self._task.config.compute))
        self._is_to_leave = _places_given() >= len(bundles)

    def _grow(self, bundle: dict[str, float]) -> None:
        """Leave once there has been room for more workers for some seconds; Ray is asked for it."""
        while len(self._places) < self._missing:
            self._places.append(place_for([bundle], self._task.config.compute))
        more = _places_given()
        if not more:
            self._room_since = None
            return
        self._room_since = self._room_since or time.monotonic()
        if time.monotonic() - self._room_since >= GROW_S:
            self._reason = f"there is room for {more} more"
            self._is_to_leave = True


def _places_given() -> int:
    """For how many workers more of this job Ray keeps room."""
    job = ray.get_runtime_context().get_job_id()
    return sum(
        len(group["bundles"])
        for name, group in ray.util.placement_group_table().items()
        if group["name"].startswith(PLACE) and group["state"] == "CREATED" and name.endswith(job)
    )
