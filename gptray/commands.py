"""Commands as a user can type them again: the same Python, the same folder of jobs, quoted."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def typed(job: str, *words: str) -> str:
    """What runs a job with these words, called as the one that runs now was.

    From a test or a notebook: `python jobs/JOB.py`.
    """
    called = _called()
    script = called.with_name(f"{job}.py") if called else Path("jobs", f"{job}.py")
    return shlex.join([sys.orig_argv[0] if called else "python", str(script), *words])


def retyped(job: str) -> str | None:
    """What runs a job with the words that this one was called with; None outside of a job."""
    return typed(job, *sys.argv[1:]) if _called() else None


def _called() -> Path | None:
    """The script of a job that this process runs."""
    script = Path(sys.argv[0])
    return script if script.suffix == ".py" and script.parent.name == "jobs" else None
