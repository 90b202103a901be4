"""The interface of all jobs: check the config once, then plan for --dry-run, or run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gptray.config import Config, UserError

Checked = TypeVar("Checked")
# (label, value) of each fact that --dry-run prints.
Plan = list[tuple[str, str]]


@dataclass(frozen=True)
class Job(Generic[Checked]):
    """The functions that the command line calls; it calls `check` once.

    check: find every mistake that can be found without torch and Ray. Raises UserError.
    plan: say what the job would do, without starting anything.
    run: do it and return the JSON line, or None if it has printed that itself.
    """

    check: Callable[[Config], Checked]
    plan: Callable[[Checked], Plan]
    run: Callable[[Checked], dict[str, Any] | None]


def find_job(name: str) -> Job[Any]:
    """The functions of `gptray.jobs.<name>`: `check` and `plan` of check.py, `run` of run.py.

    The latter is imported when the job runs, since it loads Ray.
    """
    folder = f"gptray.jobs.{name}"
    checking = importlib.import_module(f"{folder}.check")
    return Job(
        checking.check,
        checking.plan,
        lambda checked: importlib.import_module(f"{folder}.run").run(checked),
    )


class Mistakes:
    """A reusable context manager that collects the UserError of each block for `raise_any`."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, UserError):
            self.add(str(error))
        return isinstance(error, UserError)

    def add(self, message: str) -> None:
        """Add a mistake that was not raised."""
        self._messages.append(message)

    def raise_any(self) -> None:
        """If there are mistakes, raise UserError with a line for each distinct message."""
        if self._messages:
            raise UserError("\n".join(dict.fromkeys(self._messages)))
