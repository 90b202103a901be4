"""Keeps a run's report.html up to date while the run goes on, without ever endangering the run."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger("gptray")


class Reporter:
    """Writes the report of one run folder; `path` is where the last one stands, None without one.

    What goes wrong is told in a line, once for each message, and does not end the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path: str | None = None
        self._told: set[str] = set()

    def write(self, *, running: bool) -> None:
        """Write the report, whatever state the run is in."""
        from gptray.evaluation.report import write_report

        try:
            self.path = str(write_report(self._folder, running=running))
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            if message not in self._told:
                self._told.add(message)
                log.warning("the report of %s was not written: %s", self._folder, message)
