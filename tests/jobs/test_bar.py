"""Progress bars on narrow terminals: counts and the time to go are never cut."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gptray.jobs.progress.bar import new_task, progress_bar

FIGURES = ["train 3.214", "val 3.456", "ppl 31.7", "bpb 1.734", "12,345 tok/s"]


@pytest.mark.parametrize(("width", "shown"), [(45, 1), (60, 2), (80, 4), (100, 4), (160, 5)])
def test_a_bar_shows_step_and_eta_and_the_figures_that_fit(width: int, shown: int) -> None:
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=True, color_system=None)
    bar = progress_bar(console)
    task = new_task(bar, "training", total=20_000)
    bar.update(task, completed=11_234, metrics="  ".join(FIGURES), eta="1h02m")
    console.print(bar.get_renderable())
    (line,) = text.getvalue().splitlines()
    assert "11234/20000" in line and "eta 1h02m" in line and len(line) <= width
    assert [figure for figure in FIGURES if figure in line] == FIGURES[:shown]
    assert ("\u2501" in line) == (width >= 100), "the bar that is drawn"
