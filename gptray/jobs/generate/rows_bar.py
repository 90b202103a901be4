"""Progress of a generate job: rows done, tokens per second, time to go."""

from __future__ import annotations

import time
from collections.abc import Sequence

from gptray.generation.batch import Progress
from gptray.jobs.bar import Bar
from gptray.jobs.ray_metrics import Exporter
from gptray.jobs.train.watch import duration


class RowsBar:
    """A bar over all rows of a job, those done before it started included; the same as metrics.

    batch_size: of one engine.
    """

    def __init__(self, done: int, total: int, exporter: Exporter, *, batch_size: int) -> None:
        self._exporter, self._batch_size = exporter, batch_size
        self._total, self._first = total, done
        self._began = time.monotonic()
        self._bar = Bar("starting engines", total, done=done)

    def close(self) -> None:
        self._bar.close()

    def show(self, written: int, engines: Sequence[Progress], ahead: int) -> None:
        """`written` rows are in files; `ahead` more have ended; engines: their counters."""
        running = [engine for engine in engines if engine.first is not None]
        if not running:
            self._began = time.monotonic()
            return
        rows = min(written + ahead, self._total)
        seconds = max(time.monotonic() - self._began, 1e-9)
        pace = (rows - self._first) / seconds
        tokens = sum(engine.output_tokens for engine in running) / seconds
        left = duration((self._total - rows) / pace) if pace else "?"
        self._export(running, rows, tokens)
        speed = f"{tokens:,.0f} tok/s"
        line = f"{rows:,}/{self._total:,} rows  {speed}  eta {left}" if tokens else None
        self._bar.show("generating", rows, speed, eta=left, line=line)

    def _export(self, engines: Sequence[Progress], rows: int, tokens_per_sec: float) -> None:
        states = {
            "done": rows,
            "failed": sum(engine.errors for engine in engines),
            "all": self._total,
        }
        for state, number in states.items():
            self._exporter.set("gptray_rows", number, state=state)
        self._exporter.set("gptray_tokens_per_sec", tokens_per_sec, job="generate")
        for name, value in (
            ("gptray_engines", len(engines)),
            ("gptray_batch_size", len(engines) * self._batch_size),
            ("gptray_sequences_running", sum(engine.running for engine in engines)),
            ("gptray_sequences_waiting", sum(engine.waiting for engine in engines)),
        ):
            self._exporter.set(name, value)
