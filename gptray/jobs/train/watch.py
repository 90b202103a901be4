"""Shows a run's progress: a live bar on a terminal, otherwise a line per logged step.

It follows `metrics.jsonl` and `events.jsonl` in the run folder, so it needs nothing from the
workers, wherever they run.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar, cast

from rich.progress import Progress, TaskID

from gptray.evaluation.forgetting import change_sentence, changes_of
from gptray.jobs.cluster.ray_metrics import Exporter
from gptray.jobs.progress.bar import new_task, progress_bar
from gptray.jobs.progress.doing import following, so_far, telling
from gptray.storage.record import (
    EVENT_FIELDS,
    EVENTS,
    METRIC_FIELDS,
    METRICS,
    Event,
    MetricsRow,
    RowFields,
    parse_row,
    read_events,
    read_metrics,
)
from gptray.storage.stored import Unreadable
from gptray.wording import count, duration, perplexity, shortened

log = logging.getLogger("gptray")
POLL_S = 0.2
# What the run is doing between two rows.
TRAINING = "training"

T = TypeVar("T")


class _Tail(Generic[T]):
    """New rows of a growing JSON Lines file; a replaced file is read from its beginning."""

    def __init__(self, path: Path, fields: RowFields, *, from_end: bool) -> None:
        self._path, self._fields = path, fields
        # Kept open, since a new file might reuse a removed file's inode number.
        self._file: BinaryIO | None = None
        self._offset, self._told = 0, False
        if from_end and path.exists():
            self._file = path.open("rb")
            self._offset = self._file.seek(0, os.SEEK_END)

    def rows(self) -> list[T]:
        if not self._path.exists():
            return []
        if not self._file or not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
            self.close()
            self._file, self._offset = self._path.open("rb"), 0
        self._file.seek(self._offset)
        whole, newline, _ = self._file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [row for line in whole.split(b"\n") if line and (row := self._row(line))]

    def _row(self, line: bytes) -> T | None:
        """The row in a line; None if it is damaged, which is logged once."""
        try:
            return cast(T, parse_row(line, self._fields))
        except Unreadable as error:
            if not self._told:
                log.warning("%s has a damaged line: %s", self._path, error)
            self._told = True
            return None

    def close(self) -> None:
        if self._file:
            self._file.close()


class _RunWatch:
    def __init__(self, run_dir: Path, max_steps: int, on_evaluation: Callable[[], object]) -> None:
        self._on_evaluation = on_evaluation
        self._metrics = _Tail[MetricsRow](run_dir / METRICS, METRIC_FIELDS, from_end=False)
        self._events = _Tail[Event](run_dir / EVENTS, EVENT_FIELDS, from_end=True)
        self._max_steps = max_steps
        self._exporter = Exporter(run_dir.name)
        self._shown = -1  # the last step shown; rows up to it are old
        self._scored: int | None = None  # the last step whose score was shown
        self._started = False
        # What the run is doing and since when, until the next row.
        self._doing = ("starting workers", time.monotonic())
        # The longest time between two rows; after twice that, a line says what the run is doing.
        self._row_s = 0.0
        self._origin = (0, time.monotonic())  # the step and time from which to extrapolate the ETA
        self._best = math.inf
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if sys.stderr.isatty():
            self._bar = progress_bar()
            self._task = new_task(self._bar, "starting workers", total=max_steps)
            self._bar.start()

    def look(self) -> None:
        """Show what is new. Start events come first: they say from which step rows are new."""
        events = self._events.rows()
        for event in events:
            if event["event"] == "start":
                self._start(event)
            elif event["event"] == "base":
                log.info("before the first step: %s", _base_text(event))
            elif event["event"] == "building":
                self._build(event["message"])
            elif event["event"] == "landing":
                log.info("%s", event["message"])
                self._end_at(event["until"])
            elif event["event"] in ("damaged", "failure", "notice", "waiting"):
                log.warning("%s", event["message"])
            if event["event"] == "failure":
                self._doing = ("starting workers", time.monotonic())
        if not self._started:
            return
        self._look_at_rows()
        for event in events:
            if event["event"] == "evaluated":
                for prompt, output in event["samples"][:1]:
                    text = f"{prompt}|{output}".replace("\n", "\\n")
                    log.info("    %s", shortened(text, 110))
        if any(event["event"] in ("start", "evaluated") for event in events):
            self._on_evaluation()

    def _look_at_rows(self) -> None:
        """Show new rows, and again those that have received their score since."""
        rows = self._metrics.rows()
        if self._scored is None:
            history = [row["step"] for row in rows if "val_loss" in row]
            self._scored = max((step for step in history if step <= self._shown), default=-1)
        for row in rows:
            val_loss = row.get("val_loss", math.inf)
            is_best, self._best = val_loss < self._best, min(self._best, val_loss)
            is_scored = "val_loss" in row and row["step"] > self._scored
            if is_scored:
                self._scored = row["step"]
            if row["step"] > self._shown or is_scored:
                self._show(row, is_best)

    def line(self) -> str | None:
        """What the run is doing, unless a bar or rows at their usual pace show it."""
        words, since = self._doing
        is_usual = words == TRAINING and time.monotonic() - since < 2 * self._row_s
        return None if self._bar or is_usual else so_far(words, since)

    def close(self) -> None:
        self.look()
        self._metrics.close()
        self._events.close()
        if self._bar:
            self._bar.stop()

    def _build(self, what: str) -> None:
        log.info("%s", what)
        self._doing = (what, time.monotonic())
        if self._bar:
            self._bar.update(self._task, description="building kernels")

    def _start(self, event: Event) -> None:
        workers = count(event["workers"], "worker")
        total, trained = event["parameters"], event.get("trained", event["parameters"])
        parameters = f"{total:,}" if trained == total else f"{trained:,} of {total:,}"
        begins = f"resuming after step {event['step']:,}" if event["step"] else "training"
        log.info("%s: %s parameters, %s, %s", begins, parameters, workers, event["dtype"])
        if chosen := event.get("chosen"):
            log.info("%s", chosen)
        self._started, self._doing = True, ("the first steps", time.monotonic())
        self._exporter.set("gptray_max_steps", self._max_steps)
        if "until" in event:
            self._end_at(event["until"])
        self._shown = event["step"]
        self._scored = None if self._scored is None else min(self._scored, event["step"])
        self._origin = (event["step"], time.monotonic())
        if self._bar:
            doing = "landing" if "until" in event else "training"
            self._bar.update(self._task, description=doing, completed=event["step"])

    def _end_at(self, step: int) -> None:
        """Expect the run's last row at a step."""
        self._max_steps = step
        if self._bar:
            self._bar.update(self._task, total=step, description="landing")

    def _show(self, row: MetricsRow, is_best: bool) -> None:
        self._shown = max(self._shown, row["step"])
        if self._doing[0] == TRAINING:
            self._row_s = max(self._row_s, time.monotonic() - self._doing[1])
        is_last = self._shown >= self._max_steps
        self._doing = ("saving the model" if is_last else TRAINING, time.monotonic())
        self._exporter.row(row)
        metrics = _metrics_text(row)
        since, began = self._origin
        pace = (time.monotonic() - began) / max(1, self._shown - since)
        eta = duration(pace * (self._max_steps - self._shown))
        if self._bar:
            self._bar.update(self._task, completed=self._shown, metrics=metrics, eta=eta)
        if not self._bar or "val_loss" in row:
            width = len(f"{self._max_steps}")
            best = "  best so far" if is_best else ""
            line = f"step {row['step']:{width}}/{self._max_steps}  {metrics}  eta {eta}{best}"
            log.info("%s", line)


@contextmanager
def watching(
    run_dir: Path, max_steps: int, *, on_evaluation: Callable[[], object]
) -> Iterator[None]:
    """Show the run's progress on stderr while the block runs.

    `on_evaluation` is called, from a thread, when training begins and after each evaluation.
    """
    watch = _RunWatch(run_dir, max_steps, on_evaluation)
    with closing(watch), following(watch.look, every_s=POLL_S), telling(watch.line):
        yield


def show_end(run_dir: Path) -> None:
    """Log samples of the run's best model, and what it has learnt and forgotten."""
    events = read_events(run_dir)
    best = [event for event in events if event["event"] == "evaluated" and event["best"]]
    if best and (samples := best[-1]["samples"]):
        log.info("samples from the best model (step %s):", best[-1]["step"])
        for prompt, output in samples:
            log.info("%s", textwrap.indent(f"[{prompt}]{output}", "  | ", lambda line: True))
    if changed := change_sentence(changes_of(read_metrics(run_dir), events)):
        log.info("%s", changed)


def _metrics_text(row: MetricsRow) -> str:
    text = "landing  " if row.get("phase") == "landing" else ""
    text += f"train {row['train_loss']:.3f}"
    if "val_loss" in row:
        ppl = perplexity(row["val_ppl"])
        text += f"  val {row['val_loss']:.3f}  ppl {ppl}  bpb {row['val_bpb']:.3f}"
    for name, score in row.get("also", {}).items():
        text += f"  {name} bpb {score['bpb']:.3f}"
    text += f"  {row['tokens_per_sec']:,.0f} tok/s"
    return f"{text}  MFU {row['mfu']:.0%}" if "mfu" in row else text


def _base_text(event: Event) -> str:
    text = f"validation loss {event['val_loss']:.3f}"
    if "val_bpb" in event:
        text += f"  bpb {event['val_bpb']:.3f}"
    for name, score in event.get("also", {}).items():
        text += f"  {name} bpb {score['bpb']:.3f}"
    return text
