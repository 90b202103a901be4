"""Keeps report.html up to date while a job runs, without ever endangering the job."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from gptray.config import RunFailed, UserError
from gptray.reports.run.report import write_report
from gptray.storage.files import storing

log = logging.getLogger("gptray")


class Reporter:
    """Writes a folder's report. An error is logged in one line, once, and does not end the job.

    place: the folder's public path or URI. path: where the last report is; None before the first.
    """

    def __init__(self, folder: Path, place: str, write: Callable[..., Path] = write_report) -> None:
        self._folder, self._place, self._write = folder, place, write
        self.path: str | None = None
        self._told: set[str] = set()

    def write(self, *, running: bool) -> None:
        """Write the report in the run's current state."""
        try:
            with storing(self._folder / "report.html"):
                self.path = f"{self._place}/{self._write(self._folder, running=running).name}"
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            if isinstance(error, (RunFailed, UserError)):
                message = str(error)
            reason = message.partition(" (")[0]  # without the free space, which keeps changing
            if reason not in self._told:
                self._told.add(reason)
                log.warning("the report of %s was not written: %s", self._folder, message)
