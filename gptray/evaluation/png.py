"""Charts as PNG files, for slides and chats, where a page does not go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptray.evaluation.charts import Chart, Series
from gptray.files import replacing

COLOURS = {"train": "#2f6db5", "val": "#c4561a", "single": "#5b6470"}


def save_pngs(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Write `<key>.png` for each chart into a folder, whole or not at all each."""
    # A second of import that only a report's end is worth; without pyplot there is no state.
    from matplotlib.figure import Figure

    paths = []
    for chart in charts:
        tall = len(chart.series) > 1
        drawing = Figure(figsize=(9, 4.5 if tall else 2.5), dpi=120, layout="constrained")
        axes = drawing.subplots()
        for series in chart.series:
            axes.plot(*_columns(series), ".-" if series.has_dots else "-", label=series.name,
                      color=COLOURS[series.role], linewidth=1.4, markersize=5)  # fmt: skip
        for mark in chart.marks:
            turned = mark.role == "turned"
            colour = "#b3261e" if turned else "#1b7f3b"
            axes.axvline(mark.step, color=colour, linewidth=1, linestyle=":" if turned else "--")
            axes.plot(mark.step, mark.value, "o", color=colour, label=mark.label)
            if turned:
                axes.axvspan(mark.step, chart.last, color=colour, alpha=0.07, linewidth=0)
        axes.set(xlim=(0, chart.last), ylim=(chart.low, chart.high), xlabel="step")
        axes.set_ylabel(f"{chart.title}, {chart.unit}" if chart.unit else chart.title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if tall:
            axes.legend(frameon=False)
        path = folder / f"{chart.key}.png"
        with replacing(path) as draft:
            drawing.savefig(draft, format="png")
        paths.append(path)
    return paths


def _columns(series: Series) -> tuple[list[float], list[float]]:
    return [x for x, _ in series.points], [y for _, y in series.points]
