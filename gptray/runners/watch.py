"""Seeing a run: a live bar on a terminal, a plain line per logged step elsewhere.

It follows `metrics.jsonl` and `events.jsonl` in the run folder, so it shows the same whether the
workers are threads away or nodes away, and needs nothing of them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from gptray.record import EVENTS, METRICS, read_rows

log = logging.getLogger("gptray")
POLL_S = 0.2


class _Tail:
    """The rows that a JSON-lines file has got since the last look; a replaced file starts anew."""

    def __init__(self, path: Path, *, from_end: bool) -> None:
        self._path = path
        self._inode: int | None = None
        self._offset = 0
        if from_end and path.exists():
            self._inode, self._offset = path.stat().st_ino, path.stat().st_size

    def rows(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [json.loads(line) for line in whole.split(b"\n") if line]


class _Watch:
    def __init__(self, run_dir: Path, max_steps: int, on_evaluation: Callable[[], object]) -> None:
        self._on_evaluation = on_evaluation
        self._metrics = _Tail(run_dir / METRICS, from_end=False)
        self._events = _Tail(run_dir / EVENTS, from_end=True)
        self._max_steps = max_steps
        self._shown = -1  # the last step shown; rows up to here are history
        self._started = False
        self._origin = (0, time.monotonic())  # step and time from which the ETA is reckoned
        self._best = math.inf
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if sys.stderr.isatty():
            self._bar = progress_bar()
            self._task = self._bar.add_task("starting workers", total=max_steps, metrics="")
            self._bar.start()

    def look(self) -> None:
        """Show what is new. A start comes before rows: it tells from which step they are new."""
        events = self._events.rows()
        for event in events:
            if event["event"] == "start":
                self._start(event)
            elif event["event"] in ("damaged", "failure"):
                log.warning("%s", event["message"])
        if not self._started:
            return
        for row in self._metrics.rows():
            is_best = row.get("val_loss", math.inf) < self._best
            self._best = min(self._best, row.get("val_loss", math.inf))
            if row["step"] > self._shown:
                self._show(row, is_best)
        for event in events:
            if event["event"] == "evaluated":
                for prompt, output in event["samples"][:1]:
                    log.info("    %s", _one_line(prompt, output))
        if any(event["event"] in ("start", "evaluated") for event in events):
            self._on_evaluation()

    def close(self) -> None:
        self.look()
        if self._bar:
            self._bar.stop()

    def _start(self, event: dict[str, Any]) -> None:
        workers = f"{event['workers']} worker" + ("s" if event["workers"] > 1 else "")
        begins = f"resuming after step {event['step']:,}" if event["step"] else "training"
        log.info(
            "%s: %s parameters, %s, %s", begins, f"{event['parameters']:,}", workers, event["dtype"]
        )
        self._started = True
        self._shown = event["step"]
        self._origin = (event["step"], time.monotonic())
        if self._bar:
            self._bar.update(self._task, description="training", completed=event["step"])

    def _show(self, row: dict[str, Any], is_best: bool) -> None:
        self._shown = row["step"]
        metrics = _metrics_text(row)
        since, began = self._origin
        pace = (time.monotonic() - began) / max(1, row["step"] - since)
        eta = duration(pace * (self._max_steps - row["step"]))
        if self._bar:
            self._bar.update(self._task, completed=row["step"], metrics=f"{metrics}  eta {eta}")
        if not self._bar or "val_loss" in row:
            width = len(f"{self._max_steps}")
            best = "  best so far" if is_best else ""
            line = f"step {row['step']:{width}}/{self._max_steps}  {metrics}  eta {eta}{best}"
            log.info("%s", line)


@contextmanager
def watching(
    run_dir: Path, max_steps: int, *, on_evaluation: Callable[[], object]
) -> Iterator[None]:
    """Show the run's progress on stderr for as long as the block runs.

    `on_evaluation` is called, from a thread, once training has begun and after each evaluation.
    """
    watch = _Watch(run_dir, max_steps, on_evaluation)
    done = threading.Event()

    def follow() -> None:
        while not done.wait(POLL_S):
            watch.look()

    thread = threading.Thread(target=follow, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        watch.close()


def show_samples(run_dir: Path) -> None:
    """Say what the run's best model writes."""
    events = read_rows(run_dir / EVENTS)
    best = [event for event in events if event["event"] == "evaluated" and event["best"]]
    if not best or not best[-1]["samples"]:
        return
    log.info("what the best model (step %s) writes:", best[-1]["step"])
    for prompt, output in best[-1]["samples"]:
        log.info("%s", textwrap.indent(f"[{prompt}]{output}", "  | ", lambda line: True))


def progress_bar() -> Progress:
    """A bar on stderr; each task has a field `metrics`, shown behind its counts."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}"),
        console=Console(stderr=True),
    )


def _metrics_text(row: dict[str, Any]) -> str:
    text = f"train {row['train_loss']:.3f}"
    if "val_loss" in row:
        text += f"  val {row['val_loss']:.3f}  ppl {row['val_ppl']:.1f}  bpb {row['val_bpb']:.3f}"
    return f"{text}  {row['tokens_per_sec']:,.0f} tok/s"


def _one_line(prompt: str, output: str) -> str:
    text = f"{prompt}|{output}".replace("\n", "\\n")
    return text if len(text) <= 110 else f"{text[:107]}..."


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
