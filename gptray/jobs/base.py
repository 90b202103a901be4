"""The one shape of a job: check the config once, then plan for --dry-run, or run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gptray.config import Config
from gptray.files import is_uri
from gptray.node_cache import copied

Checked = TypeVar("Checked")
# Label and value of each fact that --dry-run prints.
Plan = list[tuple[str, str]]


@dataclass(frozen=True)
class Job(Generic[Checked]):
    """What the command line calls, `check` once for each command.

    check: find every mistake that can be found without torch and Ray. Raises UserError.
    plan: say what the job would do; starts nothing.
    run: do it and return the JSON line, or None where it has printed that itself.
    """

    check: Callable[[Config], Checked]
    plan: Callable[[Checked], Plan]
    run: Callable[[Checked], dict[str, Any] | None]


def config_file(path: str) -> str:
    """The config that --config names; of one by URI a copy on this node. Raises UserError."""
    return str(copied(path)) if is_uri(path) else path


def find_job(name: str) -> Job[Any]:
    """The JOB of `gptray.jobs.<name>.run`, imported only when asked for."""
    job = importlib.import_module(f"gptray.jobs.{name}.run").JOB
    assert isinstance(job, Job)
    return job
