"""Pictures of dots: what each level was worth with its interval, and trials by each setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from gptray.reports.chart import XY, tick_text, ticks
from gptray.reports.svg import NARROW, WIDE
from gptray.reports.sweep.pictures import hint, role_of
from gptray.tuning.effects import Effect, Interval, Worth
from gptray.tuning.levels import Setting
from gptray.tuning.plan import score
from gptray.tuning.ranking import Standing
from gptray.tuning.record import Trial

# Of a panel, and the room for its axes.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 250, 150, 40, 10, 8, 24
# Letters below a panel, and of a label beside an interval.
PANEL_LETTERS, LABEL_LETTERS = 30, 46
OUT_OF_PANEL = 0.9  # trials up to this rank are in a panel, the worst ones at its top


@dataclass(frozen=True)
class _Scale:
    """Effects from low to high on a stretch of pixels."""

    low: float
    high: float
    left: float
    right: float

    def x(self, value: float) -> float:
        part = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.left + part * (self.right - self.left)


def effects_figure(effects: Sequence[Effect]) -> str:
    """A dot with its interval for each level that could be compared, the best first."""
    found = sorted(
        ((effect, effect.last, effect.first) for effect in effects if effect.last and effect.first),
        key=lambda one: one[1].loss.middle,
    )
    if not found:
        return ""
    drawn = "\n".join(
        _effects_svg(found, width, kind) for width, kind in ((WIDE, "wide"), (NARROW, "narrow"))
    )
    return (
        "<figure><figcaption><b>Worth of each level</b> <small>bits per byte; line: 95 %"
        "</small>"
        '<span class="key"><i class="better"></i>lower</span>'
        '<span class="key"><i class="worse"></i>higher</span>'
        '<span class="key"><i class="single"></i>cannot be told</span></figcaption>\n'
        f"{drawn}\n</figure>"
    )


_Compared = tuple[Effect, Worth, Worth]


def _effects_svg(found: Sequence[_Compared], width: int, kind: str) -> str:
    beside = kind == "wide"
    left, row, top = (330, 34, 40) if beside else (6, 62, 40)
    middle = left + (width - left) / 2
    height = top + row * len(found) + 22
    losses = [one.loss for _, worth, first in found for one in (worth, first)]
    gaps = [one.gap for _, worth, first in found for one in (worth, first)]
    columns = [
        ("validation loss", _scale([*losses], left, middle - 14)),
        ("gap to training loss", _scale([*gaps], middle + 14, width - 6)),
    ]
    parts = [_column_axis(name, scale, top, height) for name, scale in columns]
    for number, (effect, worth, first) in enumerate(found):
        y = top + row * number + (row / 2 if beside else row - 16)
        parts.append(_label(effect, worth, y - 2 if beside else y - 28, beside=beside))
        parts.append(_reach(worth.loss, first.loss, columns[0][1], y, moved=worth != first))
        parts.append(_reach(worth.gap, first.gap, columns[1][1], y, moved=worth != first))
    spoken = f"Effects of {len(found)} levels on validation loss and gap"
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{spoken}">{"".join(parts)}</svg>'
    )


def _scale(intervals: Sequence[Interval], left: float, right: float) -> _Scale:
    """Wide enough for zero, all estimates and the intervals that say something."""
    shown = [0.0, *(one.middle for one in intervals)]
    shown += [end for one in intervals if one.is_told for end in (one.low, one.high)]
    if max(shown) - min(shown) < 1e-9:
        shown += [end for one in intervals for end in (one.low, one.high)]
    # What cannot be told shows by leaving the picture, not by making it small.
    typical = sorted(one.high - one.low for one in intervals)[len(intervals) // 2]
    low, high = min(*shown, -typical / 2), max(*shown, typical / 2)
    room = 0.06 * (high - low) or 1e-3
    return _Scale(low - room, high + room, left, right)


def _column_axis(name: str, scale: _Scale, top: float, height: float) -> str:
    bottom = height - 22
    places = ticks(scale.low, scale.high, 4 if scale.right - scale.left > 180 else 3)
    spacing = places[1] - places[0] if len(places) > 1 else 1.0
    parts = [f'<text x="{scale.left:.1f}" y="14" class="label strong">{name}</text>']
    for value in places:
        x = scale.x(value)
        kind = "grid" if value else "zero"
        text = ("+" if value > 0 else "") + tick_text(value, spacing)
        parts.append(f'<path class="{kind}" d="M{x:.1f} {top - 12}V{bottom}"/>')
        if scale.left + 10 < x < scale.right - 14:
            parts.append(f'<text class="x" x="{x:.1f}" y="{bottom + 15}">{text}</text>')
    return "".join(parts)


def _label(effect: Effect, worth: Worth, y: float, *, beside: bool) -> str:
    setting = effect.setting
    name = _cut(setting.name, LABEL_LETTERS)
    level, other = setting.levels[effect.level], setting.levels[setting.reference]
    what = _cut(f"{level} instead of {other}, step {worth.step:,}", LABEL_LETTERS + 6)
    return (
        f'<text class="over" x="0" y="{y + 14:.1f}">{escape(what)}</text>'
        f'<text class="label strong over" x="0" y="{y:.1f}">{escape(name)}</text>'
    )


def _reach(now: Interval, first: Interval, scale: _Scale, y: float, *, moved: bool) -> str:
    kind = "" if not now.is_told else "better" if now.middle < 0 else "worse"
    hint = f"<title>{now.middle:+.4f}, {now.low:+.4f} to {now.high:+.4f}</title>"
    early = ""
    if moved:
        early = (
            f'<circle class="dot hollow single" cx="{scale.x(first.middle):.1f}" cy="{y:.1f}" '
            f'r="3"><title>at the first rung {first.middle:+.4f}</title></circle>'
        )
    return (
        f'<path class="reach {kind}" d="M{scale.x(now.low):.1f} {y:.1f}H{scale.x(now.high):.1f}">'
        f"{hint}</path>{early}"
        f'<circle class="dot {kind or "single"}" cx="{scale.x(now.middle):.1f}" cy="{y:.1f}" '
        f'r="4.5">{hint}</circle>'
    )


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}\u2026"


def panels(standing: Standing) -> str:
    """A small picture for each setting: the trials' lowest losses by its value."""
    measured = {trial.name: trial for trial in standing.trials if trial.best}
    scores = sorted(score(trial) for trial in measured.values())
    if not scores:
        return ""
    top = scores[math.ceil(OUT_OF_PANEL * len(scores)) - 1]
    room = 0.12 * ((top - scores[0]) or scores[0] or 1.0)
    heights = (scores[0] - room, top + room)
    found = [
        _panel(standing, setting, measured, heights)
        for setting in standing.settings
        if any(name in setting.values for name in measured)
    ]
    return "".join(found)


def _panel(standing: Standing, setting: Setting, measured: dict[str, Trial], heights: XY) -> str:
    names = [name for name in measured if name in setting.values]
    axis = _Axis.of(setting, names)
    # The ones to be seen stand in front.
    order = ["wrong", "cut", "whole", "own", "winner"]
    names.sort(key=lambda name: order.index(role_of(measured[name], standing)))
    dots = "".join(_dot(measured[name], axis.x(name), heights, standing) for name in names)
    rows = "".join(_row(value, heights) for value in ticks(*heights, 3))
    title = escape(f"{setting.name}: lowest validation loss of {len(names)} trials by value")
    return (
        f"<figure><figcaption><b>{escape(setting.name)}</b></figcaption>"
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f"{rows}{axis.drawn}{dots}</svg></figure>"
    )


def _y(value: float, heights: XY) -> float:
    low, high = heights
    part = (min(value, high) - low) / (high - low)
    return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)


def _row(value: float, heights: XY) -> str:
    y = _y(value, heights)
    spacing = ticks(*heights, 3)
    text = tick_text(value, spacing[1] - spacing[0] if len(spacing) > 1 else abs(value))
    return (
        f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="y" x="{LEFT - 5}" y="{y + 4:.1f}">{text}</text>'
    )


def _dot(trial: Trial, x: float, heights: XY, standing: Standing) -> str:
    role = role_of(trial, standing)
    hollow = " hollow" if trial.outcome == "stopped" else ""
    radius = 4.5 if role in ("own", "winner") else 3
    return (
        f'<circle class="dot {role}{hollow}" cx="{x:.1f}" cy="{_y(score(trial), heights):.1f}" '
        f'r="{radius}"><title>{escape(hint(trial, standing))}</title></circle>'
    )


@dataclass(frozen=True)
class _Axis:
    """Where a setting's trials stand from left to right, and the marks below."""

    places: dict[str, float]
    drawn: str

    def x(self, name: str) -> float:
        return self.places[name]

    @classmethod
    def of(cls, setting: Setting, names: Sequence[str]) -> _Axis:
        if setting.entry.options:
            return cls._of_options(setting, names)
        return cls._of_range(setting, names)

    @classmethod
    def _of_options(cls, setting: Setting, names: Sequence[str]) -> _Axis:
        """A column for each option, the trials of one side by side."""
        room = (WIDTH - LEFT - RIGHT) / len(setting.levels)
        places = {}
        for level in range(len(setting.levels)):
            inside = sorted(name for name in names if setting.of[name] == level)
            for number, name in enumerate(inside):
                part = (number + 1) / (len(inside) + 1) - 0.5
                places[name] = LEFT + room * (level + 0.5 + 0.6 * part)
        letters = max(3, PANEL_LETTERS // len(setting.levels))
        marks = "".join(
            _mark(LEFT + room * (level + 0.5), _cut(name, letters))
            for level, name in enumerate(setting.levels)
        )
        return cls(places, marks)

    @classmethod
    def _of_range(cls, setting: Setting, names: Sequence[str]) -> _Axis:
        """The range from its low to its high end; what is no number stands at the left."""
        entry = setting.entry
        bend = math.log if entry.kind == "loguniform" else float
        top = entry.high - (entry.kind == "randint")  # its upper end is not drawn
        low, high = bend(entry.low), bend(top)

        def x(value: Any) -> float:
            # The config's own may lie beyond the range, or be null.
            part = -0.06
            if isinstance(value, (int, float)):
                part = (bend(min(max(value, entry.low), top)) - low) / ((high - low) or 1.0)
            return LEFT + 8 + part * (WIDTH - LEFT - RIGHT - 8)

        between = (low + high) / 2
        middle = math.exp(between) if bend is math.log else between
        marks = [_mark(x(value), f"{value:.3g}") for value in (entry.low, middle)]
        marks.append(_mark(WIDTH, f"{top:.3g}", anchor="end"))
        return cls({name: x(setting.values[name]) for name in names}, "".join(marks))


def _mark(x: float, text: str, *, anchor: str = "middle") -> str:
    style = f' style="text-anchor:{anchor}"'
    return f'<text class="x" x="{x:.1f}" y="{HEIGHT - 8}"{style}>{escape(text)}</text>'
