"""A job in this process, for what ends before Ray starts: mistakes and dry runs."""

from __future__ import annotations

import runpy
from pathlib import Path

from gptray.cli import run_job

JOBS = Path(__file__).resolve().parent.parent / "jobs"


def job_here(name: str, *arguments: str) -> int:
    """Run jobs/NAME.py as a user would, and return its exit code."""
    script = runpy.run_path(str(JOBS / f"{name}.py"), run_name=f"jobs.{name}")
    return run_job(
        script["job"], name=name, doc=script["__doc__"], plan=script["plan"], argv=arguments
    )
