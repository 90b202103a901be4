"""What each level was worth as a PNG file, for where a page does not go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptray.reports.png import save_png
from gptray.tuning.effects import Effect, Interval

BETTER, WORSE, UNTOLD = "#1b7f3b", "#b3261e", "#5b6470"


def save_effects(effects: Sequence[Effect], folder: Path) -> Path | None:
    """Write `effects.png` into a folder; nothing where nothing could be compared."""
    from matplotlib.figure import Figure

    found = [(effect, effect.last) for effect in effects if effect.last]
    if not found:
        return None
    found.sort(key=lambda one: -one[1].loss.middle)  # the best one on top
    drawing = Figure(figsize=(10, 1.2 + 0.34 * len(found)), dpi=120, layout="constrained")
    losses, gaps = drawing.subplots(1, 2, sharey=True)
    for axes, name, intervals in (
        (losses, "validation loss", [worth.loss for _, worth in found]),
        (gaps, "gap to training loss", [worth.gap for _, worth in found]),
    ):
        axes.axvline(0, color=UNTOLD, linewidth=0.8)
        for row, interval in enumerate(intervals):
            colour = _colour(interval)
            axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2)
            axes.plot(interval.middle, row, "o", color=colour, markersize=5)
        axes.set_xlabel(f"{name}, bits per byte")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    losses.set_yticks(range(len(found)), [_label(effect) for effect, _ in found])
    return save_png(drawing, folder / "effects.png")


def _colour(interval: Interval) -> str:
    if not interval.is_told:
        return UNTOLD
    return BETTER if interval.middle < 0 else WORSE


def _label(effect: Effect) -> str:
    setting = effect.setting
    level, other = setting.levels[effect.level], setting.levels[setting.reference]
    # What stands between two dollars would be set as a formula.
    return f"{setting.name} {level} against {other}".replace("$", r"\$")
