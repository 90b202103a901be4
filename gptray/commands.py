"""Commands for a user to type, quoted for a shell."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Literal


def job_command(job: str, *words: str) -> str:
    """The command of a job for another terminal: in the repository's root, or where gptray is
    installed if this process was started so.
    """
    first = {"console": ["gptray", job], "module": ["python", "-m", "gptray", job]}
    return shlex.join([*first.get(_started_as(), ["python", f"jobs/{job}.py"]), *words])


def typed(job: str, *words: str) -> str:
    """The command of a job, started just as this process was: same Python, same path.

    Outside a job, in a test or a notebook, as `job_command`.
    """
    script = Path(sys.argv[0])
    match _started_as():
        case "console":
            found = shutil.which(script.name)
            is_found = found is not None and os.path.samefile(found, script)
            return shlex.join([script.name if is_found else str(script), job, *words])
        case "module":
            return shlex.join([sys.orig_argv[0], "-m", "gptray", job, *words])
        case "script":
            return shlex.join([sys.orig_argv[0], str(script.with_name(f"{job}.py")), *words])
        case _:
            return job_command(job, *words)


def retyped(job: str) -> str | None:
    """The command of a job with the arguments of the running one; None outside a job."""
    return typed(job, *sys.argv[1:]) if _started_as() else None


def reading(parquet: str) -> str:
    """The command that prints a folder of Parquet files."""
    # In double quotes where they need no escapes: the shell's are single ones.
    is_plain = parquet.isprintable() and not {'"', "\\"} & set(parquet)
    place = f'"{parquet}"' if is_plain else repr(parquet)
    return shlex.join(["python", "-c", f"import pandas; print(pandas.read_parquet({place}))"])


def _started_as() -> Literal["console", "module", "script", ""]:
    """Whether this is the installed `gptray JOB`, `python -m gptray JOB`, or a script in jobs/."""
    script = Path(sys.argv[0])
    if script.name == "gptray" and script.is_file():
        return "console"
    if script.parts[-2:] == ("gptray", "__main__.py"):
        return "module"
    return "script" if script.suffix == ".py" and script.parent.name == "jobs" else ""
