"""Run a function over work items as a Ray Data stream, a user's mistake coming back as itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from gptray.config import RunFailed, UserError

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0

T = TypeVar("T")
R = TypeVar("R")


def stream(items: Sequence[T], task: Callable[[int, T], R], *, doing: str) -> list[R]:
    """Apply `task(number, item)` to each item on one core; results come in the items' order.

    Needs Ray. Results travel through the object store: keep them small.
    Raises the UserError of the first task that meets one, or RunFailed for one that could not
    read or write; the others are stopped.
    """
    import ray.data

    _quiet()
    rows = [{"number": number, "item": item} for number, item in enumerate(items)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Guarded(task, doing), num_cpus=1
    )
    results: dict[int, R] = {}
    began = said = time.monotonic()
    for row in dataset.iter_rows():
        if row["mistake"]:
            raise UserError(row["mistake"])
        if row["failure"]:
            raise RunFailed(row["failure"])
        results[row["number"]] = row["result"]
        if len(results) < len(rows) and time.monotonic() - said > _PROGRESS_SECONDS:
            said = time.monotonic()
            logger.info("%s: %d of %d parts, %.0f s", doing, len(results), len(rows), said - began)
    return [results[number] for number in range(len(rows))]


class _Guarded:
    """The task with its row: Ray would wrap what it raises in a traceback of its own."""

    def __init__(self, task: Callable[[int, Any], Any], doing: str) -> None:
        self._task, self._doing = task, doing
        self.__name__ = type(self).__name__

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        out = {"number": row["number"], "result": None, "mistake": "", "failure": ""}
        try:
            out["result"] = self._task(row["number"], row["item"])
        except UserError as error:
            out["mistake"] = str(error)
        except RunFailed as error:
            out["failure"] = str(error)
        except OSError as error:  # a share that went away
            out["failure"] = f"{self._doing} the source failed: {error}"
        return out


def _quiet() -> None:
    """No progress bar and no plan of execution from Ray Data, unless asked for (--verbose)."""
    import ray.data

    if not logging.getLogger("gptray").isEnabledFor(logging.DEBUG):
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
