"""What losses are worth in text: the arithmetic of benchmarks/worth.py, and its table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TypedDict

from gptray.tuning.text_curve import TextCurve

# Student's t for 95%, by the number of seeds.
T95 = {2: 12.706, 3: 4.303}


class Summary(TypedDict):
    """The results of a text; null where an interval, or one of its ends, does not exist.

    old, new: mean loss and half the width of its interval, by fraction and by way. worth: how many
    times as much text, estimated and at the interval's ends, as far as the curve goes. beyond:
    ways whose worth lies beyond the curve. pupil_keeps: the pupil's gain as a share of the
    ensemble's.
    """

    old: dict[str, list[float | None]]
    new: dict[str, list[float | None]]
    worth: dict[str, list[float | None]]
    beyond: list[str]
    pupil_keeps: float | None


def summary(
    old: Mapping[float, Sequence[float]], new: Mapping[str, Sequence[float]], *, trained_on: float
) -> Summary:
    """Summarise the losses of all seeds: the old recipe's by ascending fraction, new ones by way.

    trained_on: the fraction that the new ways trained on.
    """
    curve = TextCurve(old)
    means = {fraction: interval(losses) for fraction, losses in old.items()}
    ways = {way: interval(losses) for way, losses in new.items()}
    needed = {way: curve.needed(losses) for way, losses in new.items()}
    gain, pupil_gain = (ways["recipe"][0] - ways[way][0] for way in ("ensemble", "pupil"))
    highest, *_, lowest = (loss for loss, _ in means.values())
    return {
        "old": {f"{fraction:g}": _rounded(mean) for fraction, mean in means.items()},
        "new": {way: _rounded(mean) for way, mean in ways.items()},
        "worth": {
            way: _rounded([end / trained_on for end in (text.middle, text.low, text.high)])
            for way, text in needed.items()
        },
        "beyond": [way for way, (loss, _) in ways.items() if not lowest <= loss <= highest],
        "pupil_keeps": round(pupil_gain / gain, 3) if gain > 0 else None,
    }


def interval(losses: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and half the width of its 95% interval, which is NaN for one seed."""
    mean = statistics.mean(losses)
    if len(losses) == 1:
        return mean, math.nan
    return mean, T95[len(losses)] * statistics.stdev(losses) / math.sqrt(len(losses))


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [round(one, 3) if math.isfinite(one) else None for one in values]


def show(text: str, found: Summary) -> None:
    """Print a text's table."""
    print(f"\n{text:24} {'loss':>7} {'+-':>7}   worth, times the text")
    for fraction, mean in found["old"].items():
        print(f"{f'old, {fraction} of the text':24} {_shown(mean)}")
    for way, mean in found["new"].items():
        middle, low, high = (f"{one:.2f}" if one else "?" for one in found["worth"][way])
        far = ", beyond the curve" if way in found["beyond"] else ""
        print(f"{way:24} {_shown(mean)}   {middle} ({low} to {high}){far}")
    if found["pupil_keeps"] is not None:
        print(f"the pupil keeps {found['pupil_keeps']:.0%} of what the ensemble gains")


def _shown(values: Sequence[float | None]) -> str:
    return " ".join(f"{'' if one is None else f'{one:.3f}':>7}" for one in values)
