"""Reports when a job waits for resources on a cluster, and ends the wait after `compute.wait_s`.

A watch in the driver asks Ray which of this job's placement groups and actors are pending. If some
are, and none of the job's holds a core or GPU, the whole job waits; otherwise some of its workers
wait, which is only reported.
"""

from __future__ import annotations

import _thread
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray

from gptray import signals
from gptray.config import RunFailed, UserError
from gptray.jobs.cluster.autoscaler import grows
from gptray.jobs.cluster.cluster_nodes import (
    PLACE,
    Resources,
    alive_nodes,
    amount_words,
    free_resources,
    nodes_words,
    total,
)
from gptray.jobs.cluster.holders import actors_in, counted, holders
from gptray.jobs.cluster.own_ray import is_own_ray
from gptray.jobs.progress.doing import OF_WAIT, following
from gptray.wording import count, time_words

log = logging.getLogger("gptray")

POLL_S = 1.0
# Seconds until a wait is first reported and then again; from there the gap doubles, up to the last.
FIRST_S, REPEAT_S, MOST_S = 2.0, 10.0, 300.0
# A wait is over after this long without demand. Ray Train renews its demand every minute.
GONE_S = 5.0
# Replicas belong to Serve, which may have been started by another job.
REPLICA = "SERVE_REPLICA::gptray#"


@contextmanager
def telling_waits(wait_s: float | None) -> Iterator[None]:
    """In the block, log when the job or some of its workers start and stop waiting for resources.

    wait_s: how long the whole job may wait before the block raises RunFailed; None: forever.
    """
    if _WaitWatch.is_watching or is_own_ray():
        yield  # nobody else can hold the resources of the job's own Ray
        return
    watch = _WaitWatch(wait_s)
    _WaitWatch.is_watching = True
    try:
        with following(watch.look, every_s=POLL_S):
            yield
    except BaseException:
        if watch.gave_up:
            raise RunFailed(watch.gave_up) from None
        raise
    finally:
        _WaitWatch.is_watching = False


class _WaitWatch:
    is_watching = False

    def __init__(self, wait_s: float | None) -> None:
        self.gave_up = ""
        self._wait_s = wait_s
        self._since: float | None = None  # when the wait began; None: not waiting
        self._seen = 0.0  # when demand was last pending
        self._tell_at, self._gap_s = 0.0, REPEAT_S
        self._told = self._is_of_some = False
        self._is_in_main = threading.current_thread() is threading.main_thread()

    def look(self) -> None:
        """Report changes; called from a thread."""
        if self.gave_up:
            return
        try:
            self._judge(*demand_of_job(), time.monotonic())
        except Exception as error:  # the driver will notice if the cluster does not answer
            log.debug("waiting: %s", error)

    def _judge(self, awaited: Sequence[Resources], is_running: bool, now: float) -> None:
        if self._since is not None and (
            (awaited and is_running != self._is_of_some)
            or (not awaited and (is_running or now - self._seen > GONE_S))
        ):
            self._over()
        if not awaited:
            return
        self._seen = now
        if self._since is None:
            self._since, self._tell_at, self._gap_s = now, now + FIRST_S, REPEAT_S
            self._is_of_some = is_running
        is_too_long = self._wait_s is not None and now - self._since >= self._wait_s
        if is_too_long and not self._is_of_some:
            self._give_up(awaited)
        elif now >= self._tell_at:
            text = _waiting(awaited, is_of_some=self._is_of_some)
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
    """Who waits for what, and which other job holds the most, in words."""
    own, of_others = holders()
    text = f"waiting for {shortage(awaited, *_cluster())}"
    if is_of_some:
        number = len(awaited)
        text = (
            f"{number} of {count(number + own, 'worker')} {'is' if number == 1 else 'are'} {text}"
        )
    return text + of_others


def _cluster() -> tuple[list[Resources], list[Resources]]:
    """The resources of the nodes, and those that are free."""
    return [node.resources for node in alive_nodes()], [*free_resources().values()]


def shortage(
    awaited: Sequence[Resources], has: Sequence[Resources], free: Sequence[Resources]
) -> str:
    """The awaited and the existing resources, in words.

    awaited: what each worker needs, on one node. has, free: of each node.
    """
    first, *others = awaited
    words = amount_words(first)
    if others and all(one == first for one in others):
        words = f"{words} for each of {len(awaited)} workers"
    elif others:
        words = amount_words(total(awaited))
    all_free = total(free)
    by_gpus = any(one.get("GPU") for one in (*awaited, *has))
    there, left = (_amounts(one, by_gpus=by_gpus) for one in (total(has), all_free))
    text = f"{words}: the cluster has {there}, {left} free"
    if all(all_free.get(name, 0.0) >= number for name, number in total(awaited).items()):
        text += ", not together on one node"
    return text


def _amounts(resources: Resources, *, by_gpus: bool) -> str:
    words = amount_words(resources)
    return f"0 GPUs and {words}" if by_gpus and not resources.get("GPU") else words


def demand_of_job() -> tuple[Sequence[Resources], bool]:
    """The cores and GPUs that this job waits for, and whether it holds any."""
    awaited, holds = _placement_groups()
    actors = _actors("PENDING_CREATION") + _actors("RESTARTING")
    awaited += [needs for needs, is_placed in actors if not is_placed]
    holds = holds or any(is_placed for _, is_placed in actors)
    if awaited and not holds:  # last, since it is a large table
        holds = bool(_actors("ALIVE"))
    return awaited, holds


def _placement_groups() -> tuple[list[Resources], bool]:
    """The bundles of this job's pending placement groups, and whether it has others."""
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
    """What this job's actors in a state need outside placement groups, and whether they have it."""
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    return [
        # Before it has a worker process, the table's node is only the one that was asked.
        (needs, bool(table.address.worker_id))
        for table in actors_in(state)
        if (table.job_id == job or table.name.startswith(REPLICA)) and not table.placement_group_id
        if (needs := counted(table.required_resources))
    ]


def await_core() -> None:
    """Return once a core is free for this job's tasks; at once on its own Ray.

    Pending tasks are in none of Ray's tables, so a placement group waits in their place. Raises
    UserError if no node has a core, and none can be added.
    """
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
