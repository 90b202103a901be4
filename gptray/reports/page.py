"""The pieces of an HTML page that needs nothing but itself: no script, no network, no font.

Every text goes through `esc`, and the page's own policy forbids scripts besides.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from gptray.record import versions
from gptray.reports.style import STYLE

# What HTML may not hold, and lone surrogates, which no UTF-8 file may.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_BLANK = re.compile("\n{5,}")
# Letters of a value that is not broken into lines.
SHORT = 20
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Row:
    """One number of a table: its name, how it was computed, its value in each column."""

    name: str
    how: str
    values: tuple[str, ...]
    is_best: bool = False


def esc(text: object) -> str:
    """Text as HTML shows it; characters that cannot be shown become U+FFFD."""
    plain = str(text).replace("\r\n", "\n").replace("\r", "\n")
    return html.escape(_UNPRINTABLE.sub("\ufffd", plain))


def page(title: str, body: str, *, refresh_s: int | None) -> str:
    """The whole page; with `refresh_s` a browser looks for a newer one that often."""
    refresh = f'<meta http-equiv="refresh" content="{refresh_s}">\n' if refresh_s else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n{refresh}'
        f"<title>{esc(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def footer() -> str:
    """When the page was written, and with what."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    using = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"<footer>Written {esc(now)} with {esc(using)}.</footer>"


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """A few numbers at a glance, each with what it is."""
    found = "".join(
        f"<div><b>{esc(value)}</b><small>{esc(text)}</small></div>" for value, text in figures
    )
    return f'<div class="tiles">{found}</div>'


def section(title: str, *parts: str) -> str:
    """A section with its heading; nothing where there are no parts."""
    found = [part for part in parts if part]
    if not found:
        return ""
    return f"<section>\n<h2>{esc(title)}</h2>\n" + "\n".join(found) + "\n</section>"


def table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Numbers in columns, each row with how it was computed below its name."""
    if not rows:
        return ""
    heads = "".join(f'<th scope="col">{esc(column)}</th>' for column in columns)
    head = f"<thead><tr><td></td>{heads}</tr></thead>" if columns else ""
    width = 1 + max(len(row.values) for row in rows)
    body = "\n".join(_row(row, width) for row in rows)
    return f"<table>{head}<tbody>\n{body}\n</tbody></table>"


def _row(row: Row, columns: int) -> str:
    cells = "".join(
        # A number stays in one line; a path may need several.
        f"<td{' class=number' if len(value) <= SHORT else ''}>{esc(value)}</td>"
        for value in row.values
    )
    kinds = ["explained"] * bool(row.how) + ["best"] * row.is_best
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    how = f'\n<tr class="how"><td colspan="{columns}">{esc(row.how)}</td></tr>' if row.how else ""
    return f'<tr{kind}><th scope="row">{esc(row.name)}</th>{cells}</tr>{how}'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{esc(text)}</p>' if kind else f"<p>{esc(text)}</p>"


def details(summary: str, body: str, *, on_paper: bool) -> str:
    """Something that opens with a click; it is open on paper, or not there at all."""
    kind = "" if on_paper else ' class="screen"'
    return f"<details{kind}><summary>{esc(summary)}</summary>\n{body}\n</details>"


def continuation(prompt: str, output: str) -> str:
    """A prompt and what a model wrote after it, line breaks as they are unless they are many."""
    written = _BLANK.sub(lambda lines: f"\n<i>{len(lines[0]) - 1} empty lines</i>\n", esc(output))
    return f'<blockquote dir="auto"><b>{esc(prompt)}</b>{written}</blockquote>'
