"""Scales: from values to pixels, with round numbers for the ticks."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Maps values from low to high onto pixels from start to end."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; one beyond the scale lies outside."""
        bend = math.log if self.is_log else float
        low, high = bend(self.low), bend(self.high)
        part = (bend(value) - low) / ((high - low) or 1.0)
        return self.start + part * (self.end - self.start)

    def clamped(self, value: float) -> float:
        """The pixel of a value clamped to the scale."""
        return self.at(min(max(value, self.low), self.high))

    def ticks(self, most: int) -> list[tuple[float, float, str]]:
        """Round values with their pixels and labels."""
        values = ticks(self.low, self.high, most)
        spacing = values[1] - values[0] if len(values) > 1 else abs(self.high)
        return [(value, self.at(value), tick_text(value, spacing)) for value in values]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, with at most `most` intervals between them."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** _floor_log10(span / most)
    step = next(power * m for m in (1, 2, 5, 10, 20) if span / (power * m) <= most or m == 20)
    first = -(-low // step)
    found = []
    while first * step <= high + span * 1e-9:
        found.append(round(first * step, 12) + 0.0)  # not -0
        first += 1
    return found


def tick_text(value: float, spacing: float) -> str:
    """A tick's label, with as many decimals as tell it from its neighbours."""
    if spacing < 0.01:
        return f"{value:g}".replace("e-0", "e-")
    places = max(0, -_floor_log10(spacing * 1.0001))
    return f"{value:,.{places}f}" if value else "0"


def _floor_log10(value: float) -> int:
    return math.floor(math.log10(value))
