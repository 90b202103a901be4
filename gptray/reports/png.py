"""Charts as PNG files, for slides and chats, where a page does not go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptray.files import replacing
from gptray.reports.chart import Chart, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "train": "#2f6db5",
    "val": "#c4561a",
    "single": "#5b6470",
    "cut": "#9aa3ad",
    "whole": "#2f6db5",
    "wrong": "#b3261e",
    "own": "#c4561a",
    "winner": "#1b7f3b",
}


def save_pngs(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Write `<key>.png` for each chart into a folder, whole or not at all each."""
    # A second of import that only a report's end is worth; without pyplot there is no state.
    from matplotlib.figure import Figure

    paths = []
    for chart in charts:
        tall = len(chart.series) > 1
        drawing = Figure(figsize=(9, 4.5 if tall else 2.5), dpi=120, layout="constrained")
        _draw(chart, drawing.subplots(), with_legend=tall)
        paths.append(save_png(drawing, folder / f"{chart.key}.png"))
    return paths


def save_png(drawing: Figure, path: Path) -> Path:
    """Write a figure of matplotlib's, whole or not at all."""
    with replacing(path) as draft:
        drawing.savefig(draft, format="png")
    return path


def _draw(chart: Chart, axes: Axes, *, with_legend: bool) -> None:
    widths = {"cut": 0.8, "winner": 2.4}
    for series in chart.series:
        axes.plot(*_columns(series), ".-" if series.has_dots else "-",
                  label=series.name if series in chart.legend else None,
                  color=COLOURS[series.role], linewidth=widths.get(series.role, 1.4),
                  markersize=5)  # fmt: skip
    for step in chart.rungs:
        axes.axvline(step, color="#9aa3ad", linewidth=0.8, linestyle="--")
    for mark in chart.marks:
        turned = mark.role == "turned"
        colour = "#b3261e" if turned else "#1b7f3b"
        axes.axvline(mark.step, color=colour, linewidth=1, linestyle=":" if turned else "--")
        axes.plot(mark.step, mark.value, "o", color=colour, label=mark.label)
        if turned:
            axes.axvspan(mark.step, chart.last, color=colour, alpha=0.07, linewidth=0)
    axes.set(ylim=(chart.low, chart.high), xlabel="step")
    if chart.first:
        steps = [chart.first, *chart.rungs, chart.last]
        axes.set_xscale("log")
        axes.set_xticks(steps, [f"{step:,.0f}" for step in steps], minor=False)
        axes.set_xticks([], minor=True)
    axes.set_xlim(chart.first, chart.last)
    axes.set_ylabel(f"{chart.title}, {chart.unit}" if chart.unit else chart.title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if with_legend:
        axes.legend(frameon=False)


def _columns(series: Series) -> tuple[list[float], list[float]]:
    return [x for x, _ in series.points], [y for _, y in series.points]
