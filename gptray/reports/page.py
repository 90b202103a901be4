"""Renders pages from Jinja2 templates: self-contained files without scripts, and PNGs next to them.

Templates clean and escape every value; the page's content security policy also forbids scripts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import resvg_py
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gptray.reports.picture import Figure
from gptray.storage.files import replacing
from gptray.storage.record import versions

# Colours of pages and figures: light, dark and for print.
LIGHT = {
    "page": "#fff", "text": "#1c2024", "soft": "#5b6470", "line": "#e2e5e9", "panel": "#f5f6f8",
    "blue": "#2f6db5", "orange": "#c4561a", "grey": "#5b6470", "green": "#1b7f3b",
    "red": "#b3261e",
}  # fmt: skip
DARK = {
    "page": "#15181c", "text": "#e6e8ea", "soft": "#9aa3ad", "line": "#2c3238", "panel": "#1e2328",
    "blue": "#6aa9f0", "orange": "#f0985c", "grey": "#aab3bd", "green": "#5cc47e",
    "red": "#f2857d",
}  # fmt: skip
PRINT = LIGHT | {
    "text": "#000", "soft": "#444", "line": "#ccc", "panel": "#f3f3f3", "grey": "#444",
}  # fmt: skip
REPORT = "report.html"
# How often a browser reloads the page of a run in progress.
REFRESH_S = 10
# Values up to this length stay on one line.
SHORT = 20
# Pixels of a PNG file per pixel of the picture.
ZOOM = 1.5
# Shipped, because on a machine without fonts no text would be drawn.
FONTS = Path(__file__).parent / "fonts"
# Characters that HTML forbids, and lone surrogates, which UTF-8 forbids.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_BLANK = re.compile("(\n{5,})")


@dataclass(frozen=True)
class Row:
    """A table's row: a number's name, how it was computed, and its value in each column."""

    name: str
    how: str
    values: tuple[str, ...]
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of numbers in columns. A table without rows is false, and not shown."""

    columns: Sequence[str]
    rows: Sequence[Row]

    def __bool__(self) -> bool:
        return bool(self.rows)


def write_page(template: str, folder: Path, *, running: bool, **values: object) -> Path:
    """Write a folder's `report.html`; while `running`, a browser reloads it."""
    path = folder / REPORT
    text = render(
        template,
        name=folder.resolve().name,
        running=running,
        refresh_s=REFRESH_S if running else None,
        palettes={"light": LIGHT, "dark": DARK, "print": PRINT},
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S UTC}",
        versions=versions(),
        **values,
    )
    with replacing(path) as draft:
        draft.write_text(text, "utf-8")
    return path


def render(template: str, **values: object) -> str:
    """Fill in a template of this package."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("gptray.reports"),
        autoescape=True,
        finalize=lambda value: _clean(value) if isinstance(value, str) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["split_blank"] = lambda text: _BLANK.split(_clean(text))
    templates.globals["SHORT"] = SHORT
    return templates


def _clean(text: str) -> str:
    """Replace characters that HTML forbids with U+FFFD."""
    if isinstance(text, Markup):
        return text
    return _UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def save_png(figure: Figure, folder: Path) -> Path:
    """Write `<key>.png`, the page's wide picture in light colours; return its path."""
    # resvg does not support CSS variables.
    css = re.sub(r"var\(--(\w+)\)", lambda found: LIGHT[found[1]], render("chart.css"))
    path = folder / f"{figure.key}.png"
    image = resvg_py.svg_to_bytes(
        svg_string=render("figure.svg.j2", figure=figure, css=Markup(css)),
        zoom=ZOOM,
        background=LIGHT["page"],
        font_files=sorted(map(str, FONTS.glob("*.ttf"))),
    )
    with replacing(path) as draft:
        draft.write_bytes(bytes(image))
    return path
