"""Commands for a user to type, quoted for a shell."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path


def job_command(job: str, *words: str) -> str:
    """The command of a job for another terminal: in the repository's root, or where gptray is
    installed if this process was started so.
    """
    if _is_console():
        first = ["gptray", job]
    elif _is_module():
        first = ["python", "-m", "gptray", job]
    else:
        first = ["python", f"jobs/{job}.py"]
    return shlex.join([*first, *words])


def typed(job: str, *words: str) -> str:
    """The command of a job, started just as this process was: same Python, same path.

    Outside a job, in a test or a notebook, as `job_command`.
    """
    script = Path(sys.argv[0])
    if _is_console():
        found = shutil.which(script.name)
        is_found = found is not None and os.path.samefile(found, script)
        return shlex.join([script.name if is_found else str(script), job, *words])
    if _is_module():
        return shlex.join([sys.orig_argv[0], "-m", "gptray", job, *words])
    if _is_script():
        return shlex.join([sys.orig_argv[0], str(script.with_name(f"{job}.py")), *words])
    return job_command(job, *words)


def retyped(job: str) -> str | None:
    """The command of a job with the arguments of the running one; None outside a job."""
    is_job = _is_console() or _is_module() or _is_script()
    return typed(job, *sys.argv[1:]) if is_job else None


def _is_console() -> bool:
    """Whether this process is the installed `gptray JOB`."""
    script = Path(sys.argv[0])
    return script.name == "gptray" and script.is_file()


def _is_module() -> bool:
    """Whether this process is `python -m gptray JOB`."""
    return Path(sys.argv[0]).parts[-2:] == ("gptray", "__main__.py")


def _is_script() -> bool:
    """Whether this process is one of the scripts in jobs/."""
    script = Path(sys.argv[0])
    return script.suffix == ".py" and script.parent.name == "jobs"
