"""Figures as PNG files, for slides and chats."""

from __future__ import annotations

import re
from pathlib import Path

import resvg_py
from markupsafe import Markup

from gptray.files import replacing
from gptray.reports.colours import LIGHT
from gptray.reports.page import render
from gptray.reports.picture import Figure

# Pixels of the file per pixel of the picture.
ZOOM = 1.5
# A machine without fonts would draw no text.
FONTS = Path(__file__).parent / "fonts"


def save_png(figure: Figure, folder: Path) -> Path:
    """Write `<key>.png`, the page's wide picture in light colours; return its path."""
    # resvg has no CSS variables.
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
