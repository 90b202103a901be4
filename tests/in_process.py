"""A job in this process, for what ends before Ray starts: mistakes and dry runs."""

from __future__ import annotations

from gptray.doors import run


def job_here(name: str, *arguments: str) -> int:
    """Run a job as a user would, and return its exit code."""
    return run(name, arguments)
