"""Commands for a user to type, quoted for a shell."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def job_command(job: str, *words: str) -> str:
    """The command of a job, as typed in the repository's root."""
    return shlex.join(["python", f"jobs/{job}.py", *words])


def typed(job: str, *words: str) -> str:
    """The command of a job, by the Python and the path to jobs/ that this process was started with.

    Outside a job, in a test or a notebook, as `job_command`.
    """
    called = _called()
    if called is None:
        return job_command(job, *words)
    return shlex.join([sys.orig_argv[0], str(called.with_name(f"{job}.py")), *words])


def retyped(job: str) -> str | None:
    """The command of a job with the arguments of the running one; None outside a job."""
    return typed(job, *sys.argv[1:]) if _called() else None


def _called() -> Path | None:
    """The script in jobs/ that this process runs; None if it runs something else."""
    script = Path(sys.argv[0])
    return script if script.suffix == ".py" and script.parent.name == "jobs" else None
