"""Commands as a user can type them again: the same Python, the same folder of jobs, quoted."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def typed(job: str, *words: str) -> str:
    """What runs a job with these words, called as the one that runs now was.

    From a test or a notebook: `python jobs/JOB.py`.
    """
    called = Path(sys.argv[0])
    is_job = called.suffix == ".py" and called.parent.name == "jobs"
    python = sys.orig_argv[0] if is_job else "python"
    script = called.with_name(f"{job}.py") if is_job else Path("jobs", f"{job}.py")
    return shlex.join([python, str(script), *words])
