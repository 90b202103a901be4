"""Lists the runs of a storage path before they are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptray.config import Config
from gptray.jobs.base import Plan
from gptray.jobs.runs.listing import Listed, listed


@dataclass(frozen=True)
class CheckedRuns:
    """The content of a storage path."""

    storage_path: str
    runs: Sequence[Listed]


def check(config: Config) -> CheckedRuns:
    """List the storage path. Raises UserError if that fails."""
    return CheckedRuns(config.storage_path, listed(config))


def plan(checked: CheckedRuns) -> Plan:
    """What the job would list."""
    return [("runs", f"{len(checked.runs)} in {checked.storage_path}; the list changes nothing")]
