"""Progress of a job on stderr: a live bar on a terminal, else a line now and then."""

from __future__ import annotations

import logging
import sys
import time

from gptray.runners.watch import progress_bar

log = logging.getLogger("gptray")
# Without a terminal: seconds between two lines.
LINE_S = 10.0


class Bar:
    """What is done of `total`, with figures behind it."""

    def __init__(self, doing: str, total: int, *, done: int = 0) -> None:
        self._said = time.monotonic()
        self._bar = progress_bar() if sys.stderr.isatty() else None
        if self._bar:
            self._task = self._bar.add_task(doing, total=total, completed=done, metrics="")
            self._bar.start()

    def show(self, doing: str, done: int, figures: str, *, line: str | None) -> None:
        """Say where things stand; without a terminal by `line`, if it is time for one."""
        if self._bar:
            self._bar.update(self._task, description=doing, completed=done, metrics=figures)
        elif line and time.monotonic() - self._said >= LINE_S:
            self._said = time.monotonic()
            log.info("%s", line)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
