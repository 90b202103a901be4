"""The table of what training has done to texts besides its own."""

from __future__ import annotations

from collections.abc import Sequence

from gptray.evaluation.forgetting import Change
from gptray.reports.page import Row, Table

BEFORE = "bits per byte; before: of the weights that the run began with, after: of its best model"


def before_and_after(changes: Sequence[Change]) -> Table:
    """Bits per byte of the run's validation text and of others; empty without others."""
    rows = [
        Row(
            one.name or "Validation text",
            "" if one.name else BEFORE,
            ("-" if one.before is None else f"{one.before:.4f}", f"{one.after:.4f}"),
        )
        for one in changes
    ]
    return Table(["before", "after"], rows) if rows else Table([], [])
