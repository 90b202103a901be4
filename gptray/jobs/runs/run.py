"""The runs job: what lies in storage_path, for people and as the JSON line."""

from __future__ import annotations

from typing import Any

from gptray.config import Config
from gptray.jobs.runs.listing import listed
from gptray.jobs.runs.table import table_of
from gptray.standard_output import write_out


def runs(config: Config) -> dict[str, Any]:
    """Print the runs and sweeps of `storage_path`; return the JSON line's facts."""
    found = listed(config)
    write_out(table_of(found))
    return {"runs": [run.to_json() for run in found]}


def listing_plan(config: Config) -> list[tuple[str, str]]:
    """What the job would do."""
    return [("runs", f"{len(listed(config))} in {config.storage_path}; the list changes nothing")]
