"""The page on which people try the model: one file, with nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

# How many of the likeliest tokens it shows, where the server tells as many.
CANDIDATES = 8


def page(max_logprobs: int) -> str:
    """The page's HTML."""
    html = Path(__file__).with_name("page.html").read_text("utf-8")
    return html.replace("{{candidates}}", str(min(CANDIDATES, max_logprobs)))
