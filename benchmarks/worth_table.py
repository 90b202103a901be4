"""What losses are worth in text: the arithmetic of benchmarks/worth.py, and its table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TypedDict

# Student's t for 95 %, by the number of seeds.
T95 = {2: 12.706, 3: 4.303}


class Summary(TypedDict):
    """What is known of a text; null where there is no interval, or no end.

    old, new: mean loss and half its interval, by fraction and by way. worth: how many times the
    text, in the middle and at the interval's ends. beyond: ways whose worth lies beyond the curve.
    pupil_keeps: the pupil's gain as a share of the ensemble's.
    """

    old: dict[str, list[float | None]]
    new: dict[str, list[float | None]]
    worth: dict[str, list[float | None]]
    beyond: list[str]
    pupil_keeps: float | None


def summary(
    old: Mapping[float, Sequence[float]], new: Mapping[str, Sequence[float]], *, trained_on: float
) -> Summary:
    """From the losses of all seeds: the old recipe's by fraction, ascending; the new ones' by way.

    trained_on: the fraction that the new ones had.
    """
    curve = {fraction: interval(losses) for fraction, losses in old.items()}
    ways = {way: interval(losses) for way, losses in new.items()}
    points = [(fraction, loss) for fraction, (loss, _) in curve.items()]
    worth = {
        way: [needed(points, end) / trained_on for end in (loss, loss + half, loss - half)]
        for way, (loss, half) in ways.items()
    }
    gain, of_pupil = (ways["recipe"][0] - ways[way][0] for way in ("ensemble", "pupil"))
    lowest, highest = points[-1][1], points[0][1]
    return {
        "old": {f"{fraction:g}": _rounded(of) for fraction, of in curve.items()},
        "new": {way: _rounded(of) for way, of in ways.items()},
        "worth": {way: _rounded(of) for way, of in worth.items()},
        "beyond": [way for way, (loss, _) in ways.items() if not lowest <= loss <= highest],
        "pupil_keeps": round(of_pupil / gain, 3) if gain > 0 else None,
    }


def interval(losses: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and half its interval of 95 %, NaN for a single one."""
    mean = statistics.mean(losses)
    if len(losses) == 1:
        return mean, math.nan
    return mean, T95[len(losses)] * statistics.stdev(losses) / math.sqrt(len(losses))


def needed(curve: Sequence[tuple[float, float]], loss: float) -> float:
    """The fraction of text with this loss, on lines in the logarithm of the fraction.

    curve: fractions, ascending, and their losses. Beyond it its first or last line goes on; where
    that does not fall, infinite.
    """
    if math.isnan(loss):
        return math.nan
    lines = list(zip(curve, curve[1:], strict=False))
    (first, high), (last, low) = next((line for line in lines if loss >= line[1][1]), lines[-1])
    if low >= high:
        return last if loss >= low else math.inf
    return first * math.exp(math.log(last / first) * (high - loss) / (high - low))


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [round(one, 3) if math.isfinite(one) else None for one in values]


def show(text: str, found: Summary) -> None:
    """Print a text's table."""
    print(f"\n{text:24} {'loss':>7} {'+-':>7}   worth, times the text")
    for fraction, of in found["old"].items():
        print(f"{f'old, {fraction} of the text':24} {_shown(of)}")
    for way, of in found["new"].items():
        middle, low, high = (f"{one:.2f}" if one else "?" for one in found["worth"][way])
        far = ", beyond the curve" if way in found["beyond"] else ""
        between = f" ({low} to {high})" if of[1] is not None else ""
        print(f"{way:24} {_shown(of)}   {middle}{between}{far}")
    if found["pupil_keeps"] is not None:
        print(f"the pupil keeps {found['pupil_keeps']:.0%} of what the ensemble gains")


def _shown(of: Sequence[float | None]) -> str:
    return " ".join(f"{'' if one is None else f'{one:.3f}':>7}" for one in of)
