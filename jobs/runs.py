"""List the runs and sweeps in storage_path, newest first: state, verdict, losses, next command.

python jobs/runs.py
python jobs/runs.py storage_path=/mnt/runs
"""

from __future__ import annotations

import sys
from typing import Any

from gptray.cli import run_job
from gptray.config import Config


def job(config: Config) -> dict[str, Any]:
    from gptray.jobs.runs.listing import listed
    from gptray.jobs.runs.table import table_of
    from gptray.standard_output import write_out

    runs = listed(config)
    write_out(table_of(runs))
    return {"runs": [run.to_json() for run in runs]}


def plan(config: Config) -> list[tuple[str, str]]:
    from gptray.jobs.runs.listing import listed

    return [("runs", f"{len(listed(config))} in {config.storage_path}; the list changes nothing")]


if __name__ == "__main__":
    sys.exit(run_job(job, name="runs", doc=__doc__ or "", plan=plan))
