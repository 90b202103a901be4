"""Decides when training workers save and leave early.

A cloud preempts a node with a notice of seconds or minutes, which Ray records as draining the node;
or somebody ends a worker with SIGTERM; or there is room for more workers.
"""

from __future__ import annotations

import logging
import signal
import threading
import time

import ray
import ray.train
from ray.util.placement_group import PlacementGroup

from gptray.jobs.cluster.cluster_nodes import alive_nodes, nodes_being_preempted
from gptray.jobs.train.attempts import Places
from gptray.jobs.train.task import TrainTask
from gptray.storage.record import try_event
from gptray.training.numbers import Action
from gptray.wording import count

log = logging.getLogger("gptray")

POLL_S = 1.0
# If a node is to be preempted, training continues until twice the longest step plus this is left.
SPARE_S = 5.0
# How long the room for more workers must be unchanged before all restart to use it.
GROW_S = 10.0
# How long to wait for the watching thread to give its places back.
CLOSE_S = 5.0

_sigterm = threading.Event()


def _note_sigterm() -> None:
    """Note SIGTERM to this process, which Ray's own handler would let kill it."""
    signal.signal(signal.SIGTERM, lambda number, frame: _sigterm.set())


class Notices:
    """One worker's requests to save or leave. As a context manager, watches for their reasons."""

    def __init__(self, task: TrainTask) -> None:
        self._task, self._compute = task, task.config.compute
        context = ray.train.get_context()
        self._is_first = context.get_world_rank() == 0
        self._workers = self._next_workers = context.get_world_size()
        self._has_saved = False
        self._last, self._longest_s = time.monotonic(), 0.0
        self._reason = "a worker got SIGTERM"
        self._preempted_at: float | None = None  # when the first node will be preempted
        self._is_to_leave = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="notices", daemon=True)

    def __enter__(self) -> Notices:
        if self._task.may_lose_nodes:
            # Handlers can only be set in the main thread, where the actor's methods run.
            ray.get(ray.get_runtime_context().current_actor.execute.remote(_note_sigterm))
            if self._is_first:
                self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)

    def request(self) -> Action:
        """What this worker asks for at this step; called at every step."""
        now = time.monotonic()
        self._longest_s, self._last = max(self._longest_s, now - self._last), now
        if self._is_to_leave or _sigterm.is_set():
            return Action.LEAVE
        if self._preempted_at is None:
            return Action.NONE
        left_s = self._preempted_at - time.time()
        if left_s < 2 * self._longest_s + SPARE_S:
            return Action.LEAVE
        if self._has_saved:
            return Action.NONE
        self._has_saved = True
        self._tell(f"{self._reason} in {left_s:.0f} s; saving now, and training until then")
        return Action.SAVE

    def tell_of_leaving(self, step: int) -> None:
        """Record why the workers have left at a step."""
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
            except Exception as error:  # Ray does not answer; the next attempt may succeed
                log.warning("looking for nodes that will be preempted: %s", error)
        places.close()

    def _look(self, group: PlacementGroup, places: Places) -> None:
        """Note nodes that will be preempted, and whether there is room elsewhere or for more."""
        leaving = nodes_being_preempted()
        of_workers = ray.util.placement_group_table(group)["bundles_to_node_id"].values()
        lost = [node for node in of_workers if node in leaving]
        missing = self._compute.max_workers - self._workers  # 0 unless elastic
        places.ask(len(lost) + missing)
        given, is_settled = places.look()
        if lost:
            staying = self._workers - len(lost) + min(given, len(lost))
            self._next_workers = max(self._compute.min_workers, staying)
            names = [node.address for node in alive_nodes() if node.id in lost]
            self._reason = f"node{'s' * (len({*lost}) > 1)} {', '.join(names)} will be preempted"
            self._preempted_at = min(leaving[node] for node in lost)
            self._is_to_leave = given >= len(lost)
        elif (more := min(given, missing)) and is_settled:
            self._next_workers = self._workers + more
            self._reason = f"there is room for {more} more"
            self._is_to_leave = True
