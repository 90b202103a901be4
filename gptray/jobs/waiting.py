"""Waiting for room on a cluster: who waits says so, and `compute.wait_s` ends it.

A watch in the driver asks Ray what this job has asked for and not got: its placement groups and
actors that no node has taken. While some wait and none of the job's holds a core or GPU, nothing
runs; else some of the workers wait, which is reported and ends no job.
"""

from __future__ import annotations

import _thread
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from gptray import signals
from gptray.config import RunFailed, UserError
from gptray.jobs.autoscaler import grows
from gptray.jobs.cluster_nodes import alive_nodes, amount_words, free_resources, nodes_words, total
from gptray.jobs.doing import OF_WAIT, following
from gptray.jobs.holders import Resources, actors_in, counted, holders
from gptray.jobs.own_ray import is_own_ray
from gptray.jobs.train.attempts import PLACE
from gptray.wording import count, time_words

log = logging.getLogger("gptray")

POLL_S = 1.0
# Seconds of a wait until it is first told, and to the second time; from then on the gap doubles.
FIRST_S, REPEAT_S, MOST_S = 2.0, 10.0, 300.0
# Seconds without a demand after which a wait is over. Ray Train renews its own every minute.
GONE_S = 5.0
# Replicas belong to Serve, which may be older than this job.
REPLICA = "SERVE_REPLICA::gptray#"


class Demand(NamedTuple):
    """What a job has asked for: bundles that no node has given, and whether it got any."""

    awaited: Sequence[Resources]
    is_running: bool


@contextmanager
def telling_waits(wait_s: float | None) -> Iterator[None]:
    """Say in the block when all or some wait for want of room, and when that is over.

    wait_s: seconds after which a wait of all ends the block; None: never.

    Raises:
        RunFailed: a wait took longer than `wait_s`.
    """
    if _Watch.is_watching or is_own_ray():
        yield  # nobody else can take what the job's own Ray has
        return
    watch = _Watch(wait_s)
    _Watch.is_watching = True
    try:
        with following(watch.look, every_s=POLL_S):
            yield
    except BaseException:
        if watch.gave_up:
            raise RunFailed(watch.gave_up) from None
        raise
    finally:
        _Watch.is_watching = False


class _Watch:
    is_watching = False

    def __init__(self, wait_s: float | None) -> None:
        self.gave_up = ""
        self._wait_s = wait_s
        self._since: float | None = None  # when the wait began; None: there is none
        self._seen = 0.0  # when it was last there
        self._tell_at, self._gap_s = 0.0, REPEAT_S
        self._told = self._is_of_some = False
        self._is_in_main = threading.current_thread() is threading.main_thread()

    def look(self) -> None:
        """Tell what is new; called from a thread."""
        if self.gave_up:
            return
        try:
            self._judge(demand_of_job(), time.monotonic())
        except Exception as error:  # a cluster that does not answer is the driver's to notice
            log.debug("waiting: %s", error)

    def _judge(self, demand: Demand, now: float) -> None:
        if self._since is not None and (
            (demand.awaited and demand.is_running != self._is_of_some)
            or (not demand.awaited and (demand.is_running or now - self._seen > GONE_S))
        ):
            self._over()
        if not demand.awaited:
            return
        self._seen = now
        if self._since is None:
            self._since, self._tell_at, self._gap_s = now, now + FIRST_S, REPEAT_S
            self._is_of_some = demand.is_running
        is_too_long = self._wait_s is not None and now - self._since >= self._wait_s
        if is_too_long and not self._is_of_some:
            self._give_up(demand.awaited)
        elif now >= self._tell_at:
            text = _waiting(demand.awaited, is_of_some=self._is_of_some)
            log.info("%s", text, extra=None if self._is_of_some else OF_WAIT)
            self._told = True
            self._tell_at, self._gap_s = now + self._gap_s, min(MOST_S, 2 * self._gap_s)

    def _over(self) -> None:
        assert self._since is not None
        if self._told:
            log.info("waited %s; there is room now", time_words(self._seen - self._since))
        self._since, self._told = None, False

    def _give_up(self, awaited: Sequence[Resources]) -> None:
        self.gave_up = (
            f"waited compute.wait_s={self._wait_s:g} s for {shortage(awaited, *_cluster())}; "
            "the same command resumes"
        )
        if signals.is_handling():
            signals.fail(self.gave_up)
        elif self._is_in_main:
            _thread.interrupt_main()


def _waiting(awaited: Sequence[Resources], *, is_of_some: bool) -> str:
    """Who waits for what, and the job that holds the most."""
    own, of_others = holders()
    text = f"waiting for {shortage(awaited, *_cluster())}"
    if is_of_some:
        number = len(awaited)
        text = (
            f"{number} of {count(number + own, 'worker')} {'is' if number == 1 else 'are'} {text}"
        )
    return text + of_others


def _cluster() -> tuple[list[Resources], list[Resources]]:
    """What the nodes have, and what is free on them."""
    return [node.resources for node in alive_nodes()], [*free_resources().values()]


def shortage(
    awaited: Sequence[Resources], has: Sequence[Resources], free: Sequence[Resources]
) -> str:
    """What is awaited and what there is, in words.

    awaited: what each worker needs, on one node. has, free: what each node has.
    """
    first, *others = awaited
    words = amount_words(first)
    if others and all(one == first for one in others):
        words = f"{words} for each of {len(awaited)} workers"
    elif others:
        words = amount_words(total(awaited))
    all_free = total(free)
    text = f"{words}: the cluster has {_both(total(has))}, {_both(all_free)} free"
    if all(all_free.get(name, 0.0) >= number for name, number in total(awaited).items()):
        text += ", not together on one node"
    return text


def _both(resources: Resources) -> str:
    words = amount_words(resources)
    return words if resources.get("GPU") else f"0 GPUs and {words}"


def demand_of_job() -> Demand:
    """What this job waits for, and whether it runs; only cores and GPUs count."""
    awaited, holds = _placement_groups()
    actors = _actors("PENDING_CREATION") + _actors("RESTARTING")
    awaited += [needs for needs, is_placed in actors if not is_placed]
    holds = holds or any(is_placed for _, is_placed in actors)
    if awaited and not holds:  # a large table
        holds = bool(_actors("ALIVE"))
    return Demand(awaited, holds)


def _placement_groups() -> tuple[list[Resources], bool]:
    """The bundles of this job's groups that wait, and whether there are some that do not."""
    import ray

    awaited: list[Resources] = []
    holds = False
    job = ray.get_runtime_context().get_job_id()
    for name, group in ray.util.placement_group_table().items():
        bundles = [one for one in map(counted, group["bundles"].values()) if one]
        if not name.endswith(job) or not bundles:
            continue
        if group["state"] in ("PENDING", "RESCHEDULING"):
            awaited += bundles
        elif group["state"] != "REMOVED" and not group["name"].startswith(PLACE):
            holds = True
    return awaited, holds


def _actors(state: str) -> list[tuple[Resources, bool]]:
    """What this job's actors of a state need outside of placement groups, and if it is given."""
    import ray

    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    return [
        # Until it has a worker process, the node is the one that was asked.
        (needs, bool(table.address.worker_id))
        for table in actors_in(state)
        if (table.job_id == job or table.name.startswith(REPLICA)) and not table.placement_group_id
        if (needs := counted(table.required_resources))
    ]


def await_core() -> None:
    """Return once a core is free for tasks of this job; at once on a Ray of its own.

    Tasks that wait are in no table of Ray's, so that a placement group waits in their stead.

    Raises:
        UserError: no node has a core, and none will come.
    """
    import ray

    if is_own_ray():
        return
    nodes = alive_nodes()
    if not any(node.resources.get("CPU", 0.0) >= 1 for node in nodes) and not grows():
        raise UserError(
            f"preparing text needs a core, which no node of the cluster has: {nodes_words(nodes)}. "
            "Add nodes"
        )
    group = ray.util.placement_group([{"CPU": 1}])
    try:
        while not group.wait(POLL_S):
            pass
    finally:
        ray.util.remove_placement_group(group)
