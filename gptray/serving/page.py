"""The page on which people try the model: one file, with nothing from elsewhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def page() -> str:
    """The page's HTML."""
    return Path(__file__).with_name("page.html").read_text("utf-8")
