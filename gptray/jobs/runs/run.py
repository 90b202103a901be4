"""The runs job: lists runs as JSON and as text.

The text is a table or, below `WIDE` columns, a few lines for each run.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gptray.jobs.runs.check import CheckedRuns
from gptray.jobs.runs.listing import Listed
from gptray.standard_output import write_out
from gptray.visible import visible
from gptray.wording import magnitude, size_words

# The fewest columns of a terminal in which a run fits into one row of a table.
WIDE = 100


def run(checked: CheckedRuns) -> dict[str, object]:
    """Print the list; return it."""
    none = f"no runs in {visible(checked.storage_path)}\n"
    write_out(table_of(checked.runs) if checked.runs else none)
    return {"runs": [asdict(one) for one in checked.runs]}


def table_of(runs: Sequence[Listed]) -> str:
    """The runs as text, as wide as the terminal."""
    text = io.StringIO()
    console = Console(file=text, width=Console(file=sys.stdout).width, highlight=False)
    if console.width >= WIDE:
        console.print(_table(runs))
    for run in runs:
        if console.width < WIDE:
            figures = (f"{name} {value}".strip() for name, value in _figures(run).items() if value)
            console.print(_text(f"{run.name}  {run.kind}, {run.state}".rstrip(", ")))
            _indented(console, run.verdict, "  ".join(figures), run.problem)
        if run.next:
            # On one line whatever the width, to be copied.
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
        figures = _figures(run).values()
        cells = (run.name, run.kind, run.state, *figures, run.verdict or run.problem)
        table.add_row(*map(_text, cells))
    return table


def _figures(run: Listed) -> dict[str, str]:
    """A run's numbers by name; empty if unknown."""
    return {
        "val loss": f"{run.val_loss:.3f}" if run.val_loss is not None else "",
        "bits per byte": f"{run.val_bpb:.3f}" if run.val_bpb is not None else "",
        "parameters": magnitude(run.parameters) if run.parameters else "",
        "": size_words(run.bytes),
    }


def _text(text: str) -> Text:
    """One line without control characters, since anybody may have named the folder."""
    return Text(visible(text).replace("\n", "\\n"))
