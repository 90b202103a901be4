"""Draws curves over steps as a figure, laid out for wide and for narrow pages."""

from __future__ import annotations

from gptray.reports.chart import Chart, Mark, Series
from gptray.reports.picture import Figure, Picture, Scale, Shape, box, dot, grid, line, ticks, words

WIDE, NARROW = 820, 340
TALL, LOW = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 26
# Height of a mark's label; the labels are above the plot, one per line.
MARK_LINE = 17
# Average width of a letter in a mark's label.
LETTER = 6.9
# The least distance between two tick labels.
TICK_ROOM = 44


def curves_figure(chart: Chart) -> Figure:
    """The chart's picture with its caption and legend."""
    unit = [chart.unit] * bool(chart.unit) + ["steps on a logarithmic scale"] * bool(chart.first)
    legend = [(one.role, one.name) for one in chart.legend] if len(chart.series) > 1 else []
    wide, narrow = _picture(chart, WIDE), _picture(chart, NARROW)
    return Figure(chart.key, chart.title, "; ".join(unit), legend, wide, narrow)


def _picture(chart: Chart, width: int) -> Picture:
    height = TALL if len(chart.series) > 1 else LOW
    x = Scale(chart.first, chart.last or 1.0, LEFT, width - RIGHT, is_log=chart.first > 0)
    y = Scale(chart.low, chart.high, height - BOTTOM, TOP + MARK_LINE * len(chart.marks))
    shapes = _axes(chart, x, y)
    shapes += [line("rung", [(x.at(step), y.end), (x.at(step), y.start)]) for step in chart.rungs]
    # The steps after validation loss turned for good.
    turned = [x.at(mark.step) for mark in chart.marks if mark.role == "turned"]
    shapes += [box("shade turned", left, y.end, x.end, y.start) for left in turned]
    curves = [shape for series in chart.series for shape in _curve(series, x, y)]
    marks = [
        shape for row, mark in enumerate(chart.marks) for shape in _mark(mark, row, x, y, width)
    ]
    # Leaves room for half of the first and the last dot.
    plot = (x.start - 3, y.end, x.end + 3, y.start)
    return Picture(width, height, _spoken(chart), shapes, curves, marks, plot)


def _spoken(chart: Chart) -> str:
    parts = [f"{chart.title} over {chart.last:,} steps"]
    for series in chart.series if chart.series == chart.legend else ():
        if series.points:
            (_, first), (_, last) = series.points[0], series.points[-1]
            parts.append(f"{series.name} from {first:.4g} to {last:.4g}")
    return "; ".join(parts + [mark.label for mark in chart.marks])


def _axes(chart: Chart, x: Scale, y: Scale) -> list[Shape]:
    shapes = grid(y, max(4, int(y.start) // 40), x.start, x.end)
    # No ticks between two steps.
    most = min(max(3, int(x.end) // 100), int(chart.last))
    for step in _rung_ticks(chart, x) or ticks(0, chart.last, most):
        # A centred last label would leave the picture.
        css = "x end" if x.at(step) > x.end - 14 else "x"
        label = f"step {step:,.0f}" if step == chart.first else f"{step:,.0f}"
        shapes.append(words(css, (x.at(step), y.start + BOTTOM - 8), label))
    return [*shapes, line("axis", [(x.start, y.start), (x.end, y.start)])]


def _rung_ticks(chart: Chart, x: Scale) -> list[float]:
    """Ticks at the ends and at rungs that fit between them; none on a linear scale."""
    if not chart.first:
        return []
    kept = [chart.first]
    for step in chart.rungs:
        if min(x.at(step) - x.at(kept[-1]), x.end - x.at(step)) > TICK_ROOM:
            kept.append(step)
    return [*kept, chart.last] if chart.last > chart.first else kept


def _curve(series: Series, x: Scale, y: Scale) -> list[Shape]:
    # A logarithmic scale has no step 0.
    places = [(x.at(max(step, x.low)), y.at(value)) for step, value in series.points]
    if not places:
        return []
    shapes = [line(f"curve {series.role}", places, series.hint)]
    css = f"dot {series.role}"
    if series.has_end:
        shapes.append(dot(css, places[-1], 2.5, series.hint))
    elif series.has_dots or len(places) == 1:
        for (step, value), place in zip(series.points, places, strict=True):
            shapes.append(dot(css, place, 2.5, f"step {step:,}: {value:.4f}"))
    return shapes


def _mark(mark: Mark, row: int, x: Scale, y: Scale, width: int) -> list[Shape]:
    place, top, css = x.at(mark.step), 13 + MARK_LINE * row, f"mark {mark.role}"
    side, is_left = _label_place(mark, place, width)
    return [
        line(css, [(place, top - 9), (place, y.start)]),
        dot(css, (place, y.at(mark.value)), 5 if mark.role == "best" else 4),
        words(f"{css} end" if is_left else css, (side, top), mark.label),
    ]


def _label_place(mark: Mark, x: float, width: int) -> tuple[float, bool]:
    """Where a mark's label is anchored, and whether it ends there.

    A turn's label is to the right of its line, the others to the left, if they fit.
    """
    length = LETTER * len(mark.label)
    fits_left, fits_right = x - 6 > length, width - x - 6 > length
    if fits_left and (mark.role != "turned" or not fits_right):
        return x - 6, True
    if fits_right:
        return x + 6, False
    return (0, False) if x < width / 2 else (width, True)
