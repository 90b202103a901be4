"""How mistakes and failures come back from Ray's processes, and a map over items on Ray Data.

Ray wraps what a task raises in a traceback of its own, and takes it for a process to start again.
So a task returns its `Failure`, and the driver raises it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from gptray.config import RunFailed, UserError
from gptray.jobs.cluster_nodes import alive_nodes
from gptray.jobs.doing import so_far, telling
from gptray.jobs.ray_metrics import Exporter
from gptray.jobs.waiting import await_core

log = logging.getLogger("gptray")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Failure:
    """Why a task has no result. is_mistake: the user's mistake rather than a run that failed."""

    message: str
    is_mistake: bool = False

    def error(self) -> UserError | RunFailed:
        """What the driver is to raise."""
        return UserError(self.message) if self.is_mistake else RunFailed(self.message)


def attempt(task: Callable[[], T]) -> T | Failure:
    """Call a task in its process. Any other error than UserError and RunFailed is raised."""
    try:
        return task()
    except (UserError, RunFailed) as error:
        return Failure(str(error), isinstance(error, UserError))


def result_of(outcome: T | Failure) -> T:
    """What `attempt` returned, in the driver. Raises UserError or RunFailed for a failure."""
    if isinstance(outcome, Failure):
        raise outcome.error()
    return outcome


def map_items(
    items: Sequence[T], task: Callable[[int, T], R], *, doing: str, here: bool = False
) -> list[R]:
    """Apply `task(number, item)` to each item on one core; results come in the items' order.

    here: on this node alone. Needs Ray. Results travel through the object store: keep them small.
    Raises the UserError of the first task that meets one, or RunFailed for one that could not
    read or write; the others are stopped.
    """
    import ray.data

    _quiet()
    options = _on_this_node() if here else {"num_cpus": 1}
    if options["num_cpus"]:
        await_core()
    rows = [{"number": number, "item": item} for number, item in enumerate(items)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Mapped(task, doing), **options
    )
    results: dict[int, R] = {}
    exporter = Exporter("prepare")
    began = time.monotonic()
    with telling(lambda: so_far(f"{doing}: {len(results)} of {len(rows)} parts", began)):
        for row in dataset.iter_rows():
            if row["message"]:
                raise Failure(row["message"], row["is_mistake"]).error()
            results[row["number"]] = row["result"]
            exporter.set("gptray_done", len(results) / len(rows), doing=doing)
    return [results[number] for number in range(len(rows))]


class _Mapped:
    """The task for a row of Ray Data, which asks for a name, and for columns of one type each."""

    def __init__(self, task: Callable[[int, Any], Any], doing: str) -> None:
        self._task, self._doing = task, doing
        self.__name__ = type(self).__name__

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = row["number"]
        try:
            outcome = attempt(lambda: self._task(number, row["item"]))
        except OSError as error:  # a share that went away
            outcome = Failure(f"{self._doing} the source failed: {error}")
        if isinstance(outcome, Failure):
            return {"number": number, "result": None, **asdict(outcome)}
        return {"number": number, "result": outcome, "message": "", "is_mistake": False}


def _on_this_node() -> dict[str, Any]:
    """Options for tasks on this node, which may be one that offers no cores to Ray."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    offers = any(one.id == node and one.cpus >= 1 for one in alive_nodes())
    return {
        "num_cpus": 1 if offers else 0,
        "concurrency": None if offers else len(os.sched_getaffinity(0)),
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }


def _quiet() -> None:
    """No progress bar and no plan of execution from Ray Data, unless asked for (--verbose)."""
    import ray.data

    if not log.isEnabledFor(logging.DEBUG):
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
