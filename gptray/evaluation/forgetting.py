"""Forgetting: other texts' bits per byte before and after training, as numbers and a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptray.storage.record import Event, MetricsRow, last_event

# A text is forgotten if its bits per byte rise by more than this share; less is noise.
NOTICED = 0.01


@dataclass(frozen=True)
class Change:
    """Bits per byte of a text under a run's initial weights and under its best model.

    name: its name in evaluate.also; "" for the run's own validation text. before: None if the run
    began with random weights.
    """

    name: str
    before: float | None
    after: float

    @property
    def is_forgotten(self) -> bool:
        return self.before is not None and self.after > (1 + NOTICED) * self.before

    @property
    def words(self) -> str:
        """One text's change, such as: on docs 2.20 -> 2.90: it forgot."""
        where = f"on {self.name}" if self.name else "on your text"
        if self.before is None:
            return f"{where} {self.after:.2f}"
        verdict = ": it forgot" if self.is_forgotten else ""
        return f"{where} {self.before:.2f} -> {self.after:.2f}{verdict}"


def changes_of(rows: Sequence[MetricsRow], events: Sequence[Event]) -> list[Change]:
    """The run's own text, then those of evaluate.also; empty without such texts or a score."""
    scored = [row for row in rows if "val_loss" in row]
    best = min(scored, key=lambda row: row["val_loss"], default=None)
    if best is None or "also" not in best:
        return []
    base = last_event(events, "base") or {"event": "", "time": 0.0}
    before = {name: score["bpb"] for name, score in base.get("also", {}).items()}
    own = Change("", base.get("val_bpb"), best["val_bpb"])
    return [
        own,
        *(Change(name, before.get(name), score["bpb"]) for name, score in best["also"].items()),
    ]


def also_scores(changes: Sequence[Change]) -> dict[str, dict[str, float | None]]:
    """Bits per byte of the texts of evaluate.also before and after, for the job's JSON line."""
    return {one.name: {"base_bpb": one.before, "bpb": one.after} for one in changes if one.name}


def change_sentence(changes: Sequence[Change]) -> str:
    """All changes in a sentence; "" without any."""
    if not changes:
        return ""
    return f"Bits per byte: {'; '.join(change.words for change in changes)}."
