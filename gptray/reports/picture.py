"""Figures as shapes, from which both the page's SVG and the PNG file are made.

Scales map values to pixels, counted from the top left. `templates/chart.css` styles the shapes by
class.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

XY = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    """An SVG element with its class and attributes.

    text: the content of a text element; the tooltip of any other shape.
    """

    tag: str
    css: str
    at: dict[str, str]
    text: str = ""


@dataclass(frozen=True)
class Picture:
    """Shapes, curves in front of them and marks in front of both.

    label: for screen readers. plot: (left, top, right, bottom), to which curves are clipped.
    """

    width: int
    height: int
    label: str
    shapes: Sequence[Shape]
    curves: Sequence[Shape] = ()
    marks: Sequence[Shape] = ()
    plot: tuple[float, float, float, float] = (0, 0, 0, 0)


@dataclass(frozen=True)
class Figure:
    """A picture with its caption, and maybe another layout for narrow pages.

    key: the name of its PNG file, unique within the page. legend: (class, name) pairs.
    """

    key: str
    title: str
    unit: str
    legend: Sequence[tuple[str, str]]
    wide: Picture
    narrow: Picture | None = None


def line(css: str, points: Iterable[XY], hint: str = "") -> Shape:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return Shape("path", css, {"d": f"M{path}"}, hint)


def dot(css: str, place: XY, radius: float, hint: str = "") -> Shape:
    at = {"cx": f"{place[0]:.1f}", "cy": f"{place[1]:.1f}", "r": f"{radius:g}"}
    return Shape("circle", css, at, hint)


def box(css: str, left: float, top: float, right: float, bottom: float) -> Shape:
    at = {"x": f"{left:.1f}", "y": f"{top:.1f}"}
    return Shape(
        "rect", css, at | {"width": f"{right - left:.1f}", "height": f"{bottom - top:.1f}"}
    )


def words(css: str, place: XY, text: str) -> Shape:
    """A text: class x centres it at its place; y and end right-align it there."""
    return Shape("text", css, {"x": f"{place[0]:.1f}", "y": f"{place[1]:.1f}"}, text)


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` to pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value, outside `start` to `end` for values beyond the scale."""
        bend = math.log if self.is_log else float
        low, high = bend(self.low), bend(self.high)
        part = (bend(value) - low) / ((high - low) or 1.0)
        return self.start + part * (self.end - self.start)

    def clamped(self, value: float) -> float:
        """The pixel of a value clamped to the scale."""
        return self.at(min(max(value, self.low), self.high))

    def ticks(self, most: int) -> list[tuple[float, float, str]]:
        """Round values, each with its pixel and label."""
        values = ticks(self.low, self.high, most)
        spacing = values[1] - values[0] if len(values) > 1 else abs(self.high)
        return [(value, self.at(value), tick_text(value, spacing)) for value in values]


def grid(y: Scale, most: int, left: float, right: float, *, gap: float = 6) -> list[Shape]:
    """Horizontal lines at round values, each with a label `gap` pixels to its left."""
    shapes = []
    for _, place, text in y.ticks(most):
        shapes.append(line("grid", [(left, place), (right, place)]))
        shapes.append(words("y", (left - gap, place + 4), text))
    return shapes


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, with at most `most` intervals between them, or else two."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** _floor_log10(span / most)
    step = next(power * m for m in (1, 2, 5, 10, 20) if span / (power * m) <= most or m == 20)
    first = -(-low // step)
    found = []
    while first * step <= high + span * 1e-9:
        found.append(round(first * step, 12) + 0.0)  # not -0
        first += 1
    return found if len(found) > 1 else ticks(low, high, most + 1)  # one is no scale


def tick_text(value: float, spacing: float) -> str:
    """A tick's label, with enough decimals to distinguish it from its neighbours."""
    if spacing < 0.01:
        return f"{value:g}".replace("e-0", "e-")
    places = max(0, -_floor_log10(spacing * 1.0001))
    return f"{value:,.{places}f}" if value else "0"


def _floor_log10(value: float) -> int:
    return math.floor(math.log10(value))
