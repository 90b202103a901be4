"""Why training workers leave their places, each after a checkpoint of the step at hand.

A cloud takes a node with a notice of some seconds or minutes, which Ray keeps as a drain of the
node. Or somebody ends a worker by SIGTERM. Or there is room for more workers.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from typing import TYPE_CHECKING

import ray
import ray.train

from gptray.jobs.cluster_nodes import alive_nodes, nodes_to_be_taken
from gptray.jobs.train.attempts import Places
from gptray.jobs.train.task import TrainTask
from gptray.record import try_event
from gptray.training.numbers import Request
from gptray.wording import count

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

log = logging.getLogger("gptray")

POLL_S = 1.0
# Seconds to spare on top of twice the longest step, where training continues until a node is taken.
SPARE_S = 5.0
# Seconds for which there is the same room for more workers before all start again for it.
GROW_S = 10.0
# Seconds in which Ray takes back the places that nobody waits for any more.
CLOSE_S = 5.0

_sigterm = threading.Event()


def _heed_sigterm() -> None:
    """Note a SIGTERM to this process, which would kill it by Ray's own handler."""
    signal.signal(signal.SIGTERM, lambda number, frame: _sigterm.set())


class Notices:
    """What one worker requests of all. As a context; the first worker watches the cluster in it."""

    def __init__(self, task: TrainTask) -> None:
        self._task, self._compute = task, task.config.compute
        context = ray.train.get_context()
        self._is_first = context.get_world_rank() == 0
        self._workers = self._next_workers = context.get_world_size()
        self._has_saved = False
        self._last, self._longest_s = time.monotonic(), 0.0
        self._reason = "a worker got SIGTERM"
        self._taken_at: float | None = None  # when the first node that is to be taken will be
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

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)

    def request(self) -> Request:
        """What this worker requests at this step; called at each."""
        now = time.monotonic()
        self._longest_s, self._last = max(self._longest_s, now - self._last), now
        if self._is_to_leave or _sigterm.is_set():
            return Request.LEAVE
        if self._taken_at is None:
            return Request.NONE
        left_s = self._taken_at - time.time()
        if left_s < 2 * self._longest_s + SPARE_S:
            return Request.LEAVE
        if self._has_saved:
            return Request.NONE
        self._has_saved = True
        self._tell(f"{self._reason} in {left_s:.0f} s; saving now, and training until then")
        return Request.SAVE

    def tell_of_leaving(self, step: int) -> None:
        """Say why the workers have left at a step."""
        workers = count(self._next_workers, "worker")
        self._tell(f"saved at step {step:,}, to resume with {workers}: {self._reason}")

    def _tell(self, message: str) -> None:
        if self._is_first:
            try_event(self._task.run_dir, "notice", message=message)

    def _watch(self) -> None:
        group = ray.util.get_current_placement_group()
        assert group
        reserved = ray.util.placement_group_table(group)["bundles"][0]
        places = Places(self._compute, reserved, settled_s=GROW_S)
        while not self._closed.wait(POLL_S):
            try:
                self._look(group, places)
            except Exception as error:  # Ray does not answer; the next look may succeed
                log.warning("looking for nodes that will be taken: %s", error)
        places.close()

    def _look(self, group: PlacementGroup, places: Places) -> None:
        """Note nodes that will be taken, and whether there is room elsewhere or for more."""
        leaving = nodes_to_be_taken()
        of_workers = ray.util.placement_group_table(group)["bundles_to_node_id"].values()
        lost = [node for node in of_workers if node in leaving]
        missing = self._compute.max_workers - self._workers  # 0 of a fixed number
        places.ask(len(lost) + missing)
        given, is_settled = places.look()
        if lost:
            staying = self._workers - len(lost) + min(given, len(lost))
            self._next_workers = max(self._compute.min_workers, staying)
            names = [node.address for node in alive_nodes() if node.id in lost]
            self._reason = f"node{'s' * (len({*lost}) > 1)} {', '.join(names)} will be taken"
            self._taken_at = min(leaving[node] for node in lost)
            self._is_to_leave = given >= len(lost)
        elif (more := min(given, missing)) and is_settled:
            self._next_workers = self._workers + more
            self._reason = f"there is room for {more} more"
            self._is_to_leave = True
