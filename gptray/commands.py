"""Commands for users to type, quoted for the shell."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Literal


def job_command(job: str, *words: str) -> str:
    """A job's command for any terminal: run in the repository's root, or anywhere if gptray is
    installed and this process was started as such.
    """
    first = {"console": ["gptray", job], "module": ["python", "-m", "gptray", job]}
    return shlex.join([*first.get(_started_as(), ["python", f"jobs/{job}.py"]), *words])


def typed(job: str, *words: str) -> str:
    """A job's command in the form in which this process was started: same Python, same path.

    Outside a job, such as in a notebook, the same as `job_command`.
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
    """A job's command with the running job's arguments; None outside a job."""
    return typed(job, *sys.argv[1:]) if _started_as() else None


def reading(parquet: str) -> str:
    """The command that prints a folder of Parquet files."""
    # In double quotes where they need no escapes: the shell's are single ones.
    is_plain = parquet.isprintable() and not {'"', "\\"} & set(parquet)
    place = f'"{parquet}"' if is_plain else repr(parquet)
    return shlex.join(["python", "-c", f"import pandas; print(pandas.read_parquet({place}))"])


def _started_as() -> Literal["console", "module", "script", ""]:
    """How this job was started: as `gptray JOB`, `python -m gptray JOB` or a script in jobs/."""
    script = Path(sys.argv[0])
    if script.name == "gptray" and script.is_file():
        return "console"
    if script.parts[-2:] == ("gptray", "__main__.py"):
        return "module"
    return "script" if script.suffix == ".py" and script.parent.name == "jobs" else ""
