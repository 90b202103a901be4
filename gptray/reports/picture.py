"""Figures as shapes: one definition gives the page's SVG and the PNG file.

Coordinates are pixels from the top left. `templates/chart.css` styles the shapes by class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

XY = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    """An SVG element with its class and attributes.

    text: the words of a text; the tooltip of any other shape.
    """

    tag: str
    css: str
    at: dict[str, str]
    text: str = ""


@dataclass(frozen=True)
class Picture:
    """Shapes, curves in front of them and marks in front of both.

    label: what a screen reader says. plot: left, top, right, bottom; curves are clipped to it.
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
    """A picture with its caption, and a second layout where a narrow page needs one.

    key: the name of its PNG file, unique in the page. legend: (class, name) pairs.
    """

    key: str
    title: str
    unit: str
    legend: Sequence[tuple[str, str]]
    wide: Picture
    narrow: Picture | None = None


def line(css: str, points: Iterable[XY], hint: str = "") -> Shape:
    """A line through points."""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return Shape("path", css, {"d": f"M{path}"}, hint)


def dot(css: str, place: XY, radius: float, hint: str = "") -> Shape:
    """A dot around a place."""
    at = {"cx": f"{place[0]:.1f}", "cy": f"{place[1]:.1f}", "r": f"{radius:g}"}
    return Shape("circle", css, at, hint)


def box(css: str, left: float, top: float, right: float, bottom: float) -> Shape:
    """A filled rectangle."""
    at = {"x": f"{left:.1f}", "y": f"{top:.1f}"}
    return Shape(
        "rect", css, at | {"width": f"{right - left:.1f}", "height": f"{bottom - top:.1f}"}
    )


def words(css: str, place: XY, text: str) -> Shape:
    """A text: class x centres it, y and end make it end at its place."""
    return Shape("text", css, {"x": f"{place[0]:.1f}", "y": f"{place[1]:.1f}"}, text)
