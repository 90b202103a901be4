"""Pictures: shapes on a field of pixels, drawn once for the page's SVG and the PNG file.

How shapes look is decided by their classes in `templates/chart.css`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

XY = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    """An element of SVG with its attributes.

    text: the words of a text; of another shape, what is told where a pointer rests on it.
    """

    tag: str
    css: str
    at: dict[str, str]
    text: str = ""


@dataclass(frozen=True)
class Picture:
    """Shapes, the last in front. label: what is read aloud.

    curves: in front of the shapes, cut off at the edges of the plot: left, top, right, bottom.
    marks: in front of all.
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
    """A picture with its caption, for a wide page and, where it has to differ, a narrow one.

    key: its name in the page, and of its PNG file. legend: (class, name) of what is in it.
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
    """A dot of class `css`."""
    at = {"cx": f"{place[0]:.1f}", "cy": f"{place[1]:.1f}", "r": f"{radius:g}"}
    return Shape("circle", css, at, hint)


def box(css: str, left: float, top: float, right: float, bottom: float) -> Shape:
    """A filled rectangle."""
    at = {"x": f"{left:.1f}", "y": f"{top:.1f}"}
    return Shape(
        "rect", css, at | {"width": f"{right - left:.1f}", "height": f"{bottom - top:.1f}"}
    )


def words(css: str, place: XY, text: str) -> Shape:
    """A text; class x: around its place, y or end: left of it, otherwise right of it."""
    return Shape("text", css, {"x": f"{place[0]:.1f}", "y": f"{place[1]:.1f}"}, text)
