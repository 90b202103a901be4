"""Progress of a generate job: rows done, tokens per second, time to go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from gptray.jobs.bar import Bar
from gptray.jobs.train.watch import duration


class RowsBar:
    """A bar over all rows of a job, those done before it started included."""

    def __init__(self, done: int, total: int) -> None:
        self._total, self._first = total, done
        self._began = time.monotonic()
        self._bar = Bar("starting engines", total, done=done)

    def close(self) -> None:
        self._bar.close()

    def show(self, written: int, engines: Sequence[Any], ahead: int) -> None:
        """`written` rows are in files; `ahead` have ended besides; engines are their counters."""
        running = [engine for engine in engines if engine.first is not None]
        if not running:
            self._began = time.monotonic()
            return
        rows = min(written + ahead, self._total)
        seconds = max(time.monotonic() - self._began, 1e-9)
        pace = (rows - self._first) / seconds
        tokens = sum(engine.output_tokens for engine in running) / seconds
        left = duration((self._total - rows) / pace) if pace else "?"
        speed = f"{tokens:,.0f} tok/s"
        line = f"{rows:,}/{self._total:,} rows  {speed}  eta {left}" if tokens else None
        self._bar.show("generating", rows, speed, eta=left, line=line)
