"""A chart as SVG in the page: its colours and fonts are the page's style sheet's.

Each chart is drawn twice, for a wide and for a narrow page; the style sheet shows one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from gptray.reports.chart import XY, Chart, Mark, Series, tick_text, ticks

WIDE, NARROW = 820, 340
TALL, LOW = 320, 150
# Width of a letter of a mark's label, about.
LETTER = 6.9
# Between the labels of two steps.
TICK_ROOM = 44


@dataclass(frozen=True)
class _Frame:
    """The plot's place in the picture, in pixels."""

    chart: Chart
    width: int
    height: int
    left: int = 50
    right: int = 12
    top: int = 10
    bottom: int = 26

    def x(self, step: float) -> float:
        first, last = self.chart.first, self.chart.last
        part = step / (last or 1)
        if 0 < first < last:
            part = math.log(max(step, first) / first) / math.log(last / first)
        return self.left + part * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        part = (value - self.chart.low) / (self.chart.high - self.chart.low)
        return self.height - self.bottom - part * (self.height - self.top - self.bottom)


def figure(chart: Chart) -> str:
    """The chart with its caption and legend, as an HTML figure."""
    height = TALL if len(chart.series) > 1 else LOW
    words = [chart.unit] * bool(chart.unit) + ["steps on a logarithmic scale"] * bool(chart.first)
    unit = f" <small>{escape('; '.join(words))}</small>" if words else ""
    legend = ""
    if len(chart.series) > 1:
        legend = "".join(
            f'<span class="key"><i class="{series.role}"></i>{escape(series.name)}</span>'
            for series in chart.legend
        )
    drawn = "\n".join(
        _svg(chart, width, height, kind) for width, kind in ((WIDE, "wide"), (NARROW, "narrow"))
    )
    return (
        f"<figure><figcaption><b>{escape(chart.title)}</b>{unit}{legend}</figcaption>\n"
        f"{drawn}\n</figure>"
    )


def _svg(chart: Chart, width: int, height: int, kind: str) -> str:
    # The labels of the marks stand above the plot, a line each.
    frame = _Frame(chart, width, height, top=10 + 17 * len(chart.marks))
    name = f"{chart.key}-{kind}"
    curves = "".join(_curve(series, frame) for series in chart.series)
    marks = "".join(_mark(mark, line, frame) for line, mark in enumerate(chart.marks))
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(_spoken(chart))}">'
        # The last dot is whole, though it stands on the edge.
        f'<clipPath id="{name}"><rect x="{frame.left}" y="{frame.top}" '
        f'width="{width - frame.left - frame.right + 3}" '
        f'height="{height - frame.top - frame.bottom}"/></clipPath>'
        f"{_axes(frame)}{_rungs(frame)}{_after_turn(frame)}"
        f'<g clip-path="url(#{name})">{curves}</g>{marks}</svg>'
    )


def _spoken(chart: Chart) -> str:
    parts = [f"{chart.title} over {chart.last:,} steps"]
    for series in chart.series if chart.series == chart.legend else ():
        if series.points:
            (_, first), (_, last) = series.points[0], series.points[-1]
            parts.append(f"{series.name} from {first:.4g} to {last:.4g}")
    return "; ".join(parts + [mark.label for mark in chart.marks])


def _axes(frame: _Frame) -> str:
    chart, right = frame.chart, frame.width - frame.right
    rows = ticks(chart.low, chart.high, max(3, frame.height // 55))
    columns = _rung_ticks(frame) or ticks(0, chart.last, max(3, frame.width // 100))
    parts = []
    for value in rows:
        y = frame.y(value)
        text = tick_text(value, rows[1] - rows[0] if len(rows) > 1 else abs(value))
        parts.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{right}"/>')
        parts.append(f'<text class="y" x="{frame.left - 6}" y="{y + 4:.1f}">{text}</text>')
    for step in columns:
        x = frame.x(step)
        # The last label would stand out of the picture.
        anchor = ' style="text-anchor:end"' if x > right - 14 else ""
        label = f"step {step:,.0f}" if step == chart.first else f"{step:,.0f}"
        parts.append(f'<text class="x" x="{x:.1f}" y="{frame.height - 8}"{anchor}>{label}</text>')
    bottom = frame.height - frame.bottom
    return "".join(parts) + f'<path class="axis" d="M{frame.left} {bottom}H{right}"/>'


def _rung_ticks(frame: _Frame) -> list[float]:
    """The ends and the rungs between them that leave room; nothing where steps begin at 0."""
    chart = frame.chart
    if not chart.first:
        return []
    kept = [chart.first]
    for step in chart.rungs:
        if min(frame.x(step) - frame.x(kept[-1]), frame.x(chart.last) - frame.x(step)) > TICK_ROOM:
            kept.append(step)
    return [*kept, chart.last] if chart.last > chart.first else kept


def _rungs(frame: _Frame) -> str:
    top, bottom = frame.top, frame.height - frame.bottom
    return "".join(
        f'<path class="rung" d="M{frame.x(step):.1f} {top}V{bottom}"/>'
        for step in frame.chart.rungs
    )


def _curve(series: Series, frame: _Frame) -> str:
    places = [(frame.x(step), frame.y(value)) for step, value in series.points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    hint = f"<title>{escape(series.hint)}</title>" if series.hint else ""
    line = f'<path class="curve {series.role}" d="M{path}">{hint}</path>' if places else ""
    if series.has_end and places:
        x, y = places[-1]
        line += (
            f'<circle class="dot {series.role}" cx="{x:.1f}" cy="{y:.1f}" r="2.5">{hint}</circle>'
        )
        return line
    if not series.has_dots and len(places) > 1:
        return line
    return line + "".join(
        _dot(series, point, place) for point, place in zip(series.points, places, strict=True)
    )


def _dot(series: Series, point: XY, place: XY) -> str:
    return (
        f'<circle class="dot {series.role}" cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="2.5">'
        f"<title>step {point[0]:,}: {point[1]:.4f}</title></circle>"
    )


def _after_turn(frame: _Frame) -> str:
    """A shade over the steps since which validation loss is worse for good."""
    turned = [mark for mark in frame.chart.marks if mark.role == "turned"]
    if not turned:
        return ""
    left, right = frame.x(turned[0].step), frame.width - frame.right
    height = frame.height - frame.top - frame.bottom
    return (
        f'<rect class="shade" x="{left:.1f}" y="{frame.top}" width="{right - left:.1f}" '
        f'height="{height}"/>'
    )


def _mark(mark: Mark, line: int, frame: _Frame) -> str:
    x, y, top = frame.x(mark.step), frame.y(mark.value), 13 + 17 * line
    side, anchor = _label_place(mark, x, frame.width)
    radius = 5 if mark.role == "best" else 4
    return (
        f'<path class="mark {mark.role}" d="M{x:.1f} {top - 9}V{frame.height - frame.bottom}"/>'
        f'<circle class="mark {mark.role}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
        f'<text class="mark {mark.role}" x="{side:.1f}" y="{top}" '
        f'text-anchor="{anchor}">{escape(mark.label)}</text>'
    )


def _label_place(mark: Mark, x: float, width: int) -> tuple[float, str]:
    """Where a mark's label is anchored: the best to the left of its line, a turn to the right."""
    length = LETTER * len(mark.label)
    fits_left, fits_right = x - 6 > length, width - x - 6 > length
    if fits_left and (mark.role == "best" or not fits_right):
        return x - 6, "end"
    if fits_right:
        return x + 6, "start"
    return (0, "start") if x < width / 2 else (width, "end")
