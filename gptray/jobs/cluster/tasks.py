"""Returns mistakes and failures from Ray's processes, and maps a function over items on Ray Data.

Ray wraps a task's exception in its own traceback, and may restart the process. So a task returns
its `Failure`, and the driver raises it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gptray.config import RunFailed, UserError
from gptray.jobs.cluster.cluster_nodes import alive_nodes
from gptray.jobs.cluster.ray_metrics import Exporter
from gptray.jobs.cluster.waiting import await_core
from gptray.jobs.progress.doing import so_far, telling
from gptray.system import usable_cores
from gptray.wording import count

log = logging.getLogger("gptray")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Failure:
    """Why a task has no result. is_mistake: whether it is a UserError rather than a RunFailed."""

    message: str
    is_mistake: bool = False

    def error(self) -> UserError | RunFailed:
        """The exception for the driver to raise."""
        return UserError(self.message) if self.is_mistake else RunFailed(self.message)


def attempt(task: Callable[[], T]) -> T | Failure:
    """Call a task, returning a UserError or RunFailed as a Failure; other errors are raised."""
    try:
        return task()
    except (UserError, RunFailed) as error:
        return Failure(str(error), isinstance(error, UserError))


def result_of(outcome: T | Failure) -> T:
    """In the driver, the result of `attempt`. Raises UserError or RunFailed for a failure."""
    if isinstance(outcome, Failure):
        raise outcome.error()
    return outcome


def map_items(
    items: Sequence[T], task: Callable[[int, T], R], *, doing: str, here: bool = False
) -> list[R]:
    """Apply `task(number, item)` to each item, on one core each; results are in the items' order.

    here: only on this node. Needs Ray. Results go through the object store, so keep them small.
    Raises the first task's UserError, or RunFailed for one that could not read or write; the others
    are stopped.
    """
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
    began, parts = time.monotonic(), count(len(rows), "part")
    with telling(lambda: so_far(f"{doing}: {len(results)} of {parts}", began)):
        for row in dataset.iter_rows():
            if row["message"]:
                raise Failure(row["message"], row["is_mistake"]).error()
            results[row["number"]] = row["result"]
            exporter.set("gptray_done", len(results) / len(rows), doing=doing)
    return [results[number] for number in range(len(rows))]


class _Mapped:
    """The function for a row of Ray Data, which requires a name, and columns of a single type."""

    def __init__(self, task: Callable[[int, Any], Any], doing: str) -> None:
        self._task, self._doing = task, doing
        self.__name__ = type(self).__name__

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = row["number"]
        try:
            outcome = attempt(lambda: self._task(number, row["item"]))
        except OSError as error:  # such as a lost network share
            outcome = Failure(f"{self._doing} the source failed: {error}")
        if isinstance(outcome, Failure):
            return {"number": number, "result": None, **asdict(outcome)}
        return {"number": number, "result": outcome, "message": "", "is_mistake": False}


def _on_this_node() -> dict[str, Any]:
    """Options for tasks on this node, which may offer no cores to Ray."""
    node = ray.get_runtime_context().get_node_id()
    offers = any(one.id == node and one.cpus >= 1 for one in alive_nodes())
    return {
        "num_cpus": 1 if offers else 0,
        "concurrency": None if offers else usable_cores(),
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }


def _quiet() -> None:
    """Silence Ray Data's progress bar and execution plan, except with --verbose."""
    if not log.isEnabledFor(logging.DEBUG):
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
