"""The one shape of a job: check the config once, then plan for --dry-run, or run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gptray.config import Config

Checked = TypeVar("Checked")
# Label and value of each fact that --dry-run prints.
Plan = list[tuple[str, str]]

# The module in which each job's JOB stands.
JOBS = {
    "prepare": "gptray.jobs.prepare.run",
    "train": "gptray.jobs.train.run",
    "tune": "gptray.jobs.tune.run",
    "evaluate": "gptray.jobs.evaluate.run",
    "generate": "gptray.jobs.generate.run",
    "serve": "gptray.jobs.serve.run",
    "runs": "gptray.jobs.runs.run",
}


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


def find_job(name: str) -> Job[Any]:
    """The job of a name in JOBS. Imported only now: a wrong key is to be refused at once."""
    job = importlib.import_module(JOBS[name]).JOB
    assert isinstance(job, Job)
    return job
