"""A job's progress on stderr: a live bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Column
from rich.text import Text

from gptray.jobs.progress.doing import so_far, telling

# Columns of the drawn bar, and of a terminal that has room for it.
BAR, WIDE = 24, 100


def progress_bar(console: Console | None = None) -> Progress:
    """A progress display on stderr for tasks of `new_task`; it always shows counts and ETA.

    A narrow terminal drops the drawn bar first, then figures from the last to the first.
    """
    console = console or Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        *([BarColumn(BAR)] if console.width >= WIDE else []),
        MofNCompleteColumn(),
        _Eta(),
        _Figures(console),
        console=console,
    )


def new_task(bar: Progress, doing: str, *, total: int, done: int = 0) -> TaskID:
    """Add a task whose `metrics` and `eta` are shown after its counts."""
    return bar.add_task(doing, total=total, completed=done, metrics="", eta="")


class _Eta(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_eta(task))


class _Figures(ProgressColumn):
    """As many figures (separated by two spaces) as fit beside the other columns."""

    def __init__(self, console: Console) -> None:
        super().__init__(Column(no_wrap=True))
        self._console = console

    def render(self, task: Task) -> Text:
        width = self._console.width
        others = [task.description, f"{task.total:.0f}/{task.total:.0f}", _eta(task)]
        room = width - sum(len(text) + 1 for text in others) - (BAR + 1 if width >= WIDE else 0)
        figures = task.fields["metrics"].split("  ")
        while figures and len("  ".join(figures)) > room:
            figures.pop()
        return Text("  ".join(figures))


def _eta(task: Task) -> str:
    return f"eta {task.fields['eta']}" if task.fields["eta"] else ""


class Bar:
    """Progress towards `total`, with figures."""

    def __init__(self, doing: str, total: int, *, done: int = 0) -> None:
        self._doing, self._began = doing, time.monotonic()
        self._line: str | None = None
        self._told = ExitStack()
        self._bar = progress_bar() if sys.stderr.isatty() else None
        if self._bar:
            self._task = new_task(self._bar, doing, total=total, done=done)
            self._bar.start()
        else:
            self._told.enter_context(telling(self._text))

    def show(self, doing: str, done: int, figures: str, *, eta: str, line: str | None) -> None:
        """Update the display; without a terminal, `line` is logged when the next one is due."""
        self._line = line or self._line
        if self._bar:
            self._bar.update(
                self._task, description=doing, completed=done, metrics=figures, eta=eta
            )

    def close(self) -> None:
        self._told.close()
        if self._bar:
            self._bar.stop()

    def _text(self) -> str:
        return self._line or so_far(self._doing, self._began)
