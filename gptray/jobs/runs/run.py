"""The list of runs, as text for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptray.config import Config
from gptray.jobs.base import Job, Plan
from gptray.jobs.runs.listing import Listed, listed
from gptray.jobs.runs.runs_table import table_of
from gptray.standard_output import write_out


@dataclass(frozen=True)
class CheckedRuns:
    """What lies in a storage path."""

    storage_path: str
    runs: Sequence[Listed]


def check(config: Config) -> CheckedRuns:
    """List the storage path. Raises UserError if that fails."""
    return CheckedRuns(config.storage_path, listed(config))


def plan(checked: CheckedRuns) -> Plan:
    """What the job would list."""
    return [("runs", f"{len(checked.runs)} in {checked.storage_path}; the list changes nothing")]


def run(checked: CheckedRuns) -> dict[str, object]:
    """Print the list; return it."""
    write_out(table_of(checked.runs))
    return {"runs": [one.to_json() for one in checked.runs]}


JOB = Job(check, plan, run)
