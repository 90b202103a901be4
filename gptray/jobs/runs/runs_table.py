"""The list of runs as people read it: a table or, below 100 columns, a few lines for each run."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gptray.jobs.runs.listing import Listed
from gptray.visible import visible
from gptray.wording import magnitude

# Columns of a terminal from which a run fits into one row of a table.
WIDE = 100


def table_of(runs: Sequence[Listed]) -> str:
    """The runs as text, as wide as the terminal is."""
    text = io.StringIO()
    console = Console(file=text, width=Console(file=sys.stdout).width, highlight=False)
    if console.width >= WIDE:
        console.print(_table(runs))
    for run in runs:
        if console.width < WIDE:
            figures = "  ".join(cell for cell in _cells(run)[3:] if cell)
            console.print(_text(f"{run.name}  {run.kind}, {run.state}".rstrip(", ")))
            _indented(console, run.verdict, figures, run.problem)
        if run.next:
            # One line whatever the width: it is to be copied.
            console.print(_text(f"    {run.next}"), soft_wrap=True)
    return text.getvalue()


def _indented(console: Console, *texts: str) -> None:
    for text in filter(None, texts):
        for line in _text(text).wrap(console, console.width - 4):
            console.print(Text("    ") + line)


def _table(runs: Sequence[Listed]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("name", "kind", "state", "val loss", "bits/byte", "params", "disk", "verdict"):
        is_number = column in ("val loss", "bits/byte", "params", "disk")
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for run in runs:
        name, kind, state, loss, bpb, parameters, size = _cells(run)
        numbers = [cell.split(" ")[-1] for cell in (loss, bpb)]
        size_words = parameters.removeprefix("parameters ")
        cells = (name, kind, state, *numbers, size_words, size, run.verdict or run.problem)
        table.add_row(*map(_text, cells))
    return table


def _cells(run: Listed) -> tuple[str, str, str, str, str, str, str]:
    return (
        run.name,
        run.kind,
        run.state,
        f"val loss {run.val_loss:.3f}" if run.val_loss is not None else "",
        f"bits per byte {run.val_bpb:.3f}" if run.val_bpb is not None else "",
        f"parameters {magnitude(run.parameters)}" if run.parameters else "",
        f"{run.bytes / 1e6:,.1f} MB",
    )


def _text(text: str) -> Text:
    """One line that cannot command the terminal: anybody may have named the folder."""
    return Text(visible(text).replace("\n", "\\n"))
