"""A figure of each level's effect on loss and gap: dots with intervals."""

from __future__ import annotations

from collections.abc import Sequence

from gptray.reports.curves import NARROW, TICK_ROOM, WIDE
from gptray.reports.picture import Figure, Picture, Scale, Shape, dot, line, words
from gptray.reports.sweep.headline import compared_levels
from gptray.tuning.effects import Effect, EffectSize, Interval
from gptray.wording import shortened

# The most letters of a label.
LETTERS = 44
TOP, BOTTOM = 40, 22
LEGEND = (("better", "lower"), ("worse", "higher"), ("single", "unclear"))

_Compared = tuple[Effect, EffectSize, EffectSize]


def effects_figure(effects: Sequence[Effect]) -> Figure | None:
    """A figure with a row for each compared level, the best first; None if there is none."""
    found = sorted(
        ((effect, effect.last, effect.first) for effect in effects if effect.last and effect.first),
        key=lambda one: one[1].loss.middle,
    )
    if not found:
        return None
    wide = _picture(found, WIDE, left=345, row=34)
    narrow = _picture(found, NARROW, left=6, row=62)
    unit = "bits per byte; line: 95%"
    return Figure("effects", "Effect of each level", unit, LEGEND, wide, narrow)


def _picture(found: Sequence[_Compared], width: int, *, left: int, row: int) -> Picture:
    """Labels are to the left of the intervals or, if there is no room, above them."""
    is_beside = left > 100
    middle = left + (width - left) / 2
    bottom = TOP + row * len(found)
    losses = [one.loss for _, worth, first in found for one in (worth, first)]
    gaps = [one.gap for _, worth, first in found for one in (worth, first)]
    loss, gap = _scale(losses, left, middle - 14), _scale(gaps, middle + 14, width - 6)
    shapes = _axis("validation loss", loss, bottom) + _axis("gap to training loss", gap, bottom)
    for number, (effect, worth, first) in enumerate(found):
        y = TOP + row * number + (row / 2 if is_beside else row - 16)
        shapes += _label(effect, worth, y - 2 if is_beside else y - 28)
        shapes += _reach(worth.loss, first.loss, loss, y, moved=worth != first)
        shapes += _reach(worth.gap, first.gap, gap, y, moved=worth != first)
    label = f"Effects of {len(found)} levels on validation loss and gap"
    return Picture(width, bottom + BOTTOM, label, shapes)


def _scale(intervals: Sequence[Interval], left: float, right: float) -> Scale:
    """A scale that includes zero, all estimates and the intervals that exclude zero."""
    shown = [0.0, *(one.middle for one in intervals)]
    shown += [end for one in intervals if one.excludes_zero for end in (one.low, one.high)]
    if max(shown) - min(shown) < 1e-9:
        shown += [end for one in intervals for end in (one.low, one.high)]
    # A very wide interval may leave the picture rather than shrink the others.
    typical = sorted(one.high - one.low for one in intervals)[len(intervals) // 2]
    low, high = min(*shown, -typical / 2), max(*shown, typical / 2)
    room = 0.06 * (high - low) or 1e-3
    return Scale(low - room, high + room, left, right)


def _axis(name: str, scale: Scale, bottom: float) -> list[Shape]:
    shapes = [words("label strong", (scale.start, 14), name)]
    free = scale.start - TICK_ROOM + 10
    for value, x, text in scale.ticks(4):
        shapes.append(line("grid" if value else "zero", [(x, TOP - 12), (x, bottom)]))
        if free + TICK_ROOM < x < scale.end - 14:
            shapes.append(words("x", (x, bottom + 15), "+" * (value > 0) + text))
            free = x
    return shapes


def _label(effect: Effect, worth: EffectSize, y: float) -> list[Shape]:
    told = f"{compared_levels(effect)}, step {worth.step:,}"
    what = shortened(told, LETTERS + 10, mark="\u2026")
    return [
        words("over", (0, y + 14), what),
        words("label strong over", (0, y), shortened(effect.setting.name, LETTERS, mark="\u2026")),
    ]


def _reach(now: Interval, first: Interval, scale: Scale, y: float, *, moved: bool) -> list[Shape]:
    css = "single" if not now.excludes_zero else "better" if now.middle < 0 else "worse"
    hint = f"{now.middle:+.4f}, {now.low:+.4f} to {now.high:+.4f}"
    ends = [(scale.clamped(now.low), y), (scale.clamped(now.high), y)]
    shapes = [line(f"reach {css}", ends, hint)]
    if moved:
        told = f"at the first rung {first.middle:+.4f}"
        shapes.append(dot("dot hollow single", (scale.clamped(first.middle), y), 3, told))
    return [*shapes, dot(f"dot {css}", (scale.clamped(now.middle), y), 4.5, hint)]
