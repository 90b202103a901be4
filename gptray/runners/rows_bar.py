"""Progress of a generate job on stderr: a live bar on a terminal, else a line now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.progress import Progress

from gptray.runners.watch import duration, progress_bar

log = logging.getLogger("gptray")
# Without a terminal: seconds between two lines.
LINE_S = 10.0


class RowsBar:
    """Rows done, tokens per second, time to go."""

    def __init__(self, done: int, total: int) -> None:
        self._total, self._first = total, done
        self._began = self._said = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = progress_bar()
            self._task = self._bar.add_task(
                "starting engines", total=total, completed=done, metrics=""
            )
            self._bar.start()

    def close(self) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, written: int, engines: Sequence[Any], ahead: int) -> None:
        """`written` rows are in files; `ahead` have ended besides; engines are their counters."""
        running = [engine for engine in engines if engine.first is not None]
        if not running:
            self._began = time.monotonic()
            return
        rows = min(written + ahead, self._total)
        now = time.monotonic()
        pace = (rows - self._first) / max(now - self._began, 1e-9)
        tokens = sum(engine.output_tokens for engine in running) / max(now - self._began, 1e-9)
        left = duration((self._total - rows) / pace) if pace else "?"
        speed = f"{tokens:,.0f} tok/s  eta {left}"
        if self._bar:
            self._bar.update(self._task, description="generating", completed=rows, metrics=speed)
        elif tokens and now - self._said >= LINE_S:
            self._said = now
            log.info("%s/%s rows  %s", f"{rows:,}", f"{self._total:,}", speed)
