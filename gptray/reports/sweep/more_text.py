"""What more text would gain, and how much text settings are worth: sentences and a figure."""

from __future__ import annotations

from collections.abc import Iterator

from gptray.reports.curves import LEFT, NARROW, RIGHT, TALL, TICK_ROOM, TOP, WIDE
from gptray.reports.picture import Figure, Picture, Scale, Shape, dot, grid, line, words
from gptray.tuning.effects import Interval
from gptray.tuning.text_curve import ENOUGH_SEEDS, ENOUGH_SHARES
from gptray.tuning.text_shares import SHARE, Recipe, TextShares
from gptray.tuning.trial_plan import score
from gptray.wording import decimals

# Settings that count as measures against overfitting.
AGAINST_OVERFITTING = (
    "data.token_replacement", "model.dropout", "optim.weight_decay", "optim.weight_decay_schedule",
    "optim.schedule", "optim.decay_fraction", "train.ema", "train.patience", "lora.dropout",
)  # fmt: skip
# The roles, and so colours, of the other recipes; the last is shared from the third on.
ROLES = ("better", "own", "single")
BOTTOM = 42
CURVE_POINTS = 60

_Lines = list[tuple[str, str]]  # each sentence's beginning, and its rest


def text_lines(found: TextShares) -> _Lines:
    """What the runs say about more text or, if nothing, why."""
    if found.plain is None:
        return [
            (
                "Not enough trials",
                f" to say what more text would bring: it takes {ENOUGH_SHARES} values of "
                f"{SHARE}, each with at least {ENOUGH_SEEDS} seeds run to the end and all other "
                "settings the same.",
            )
        ]
    curve = found.curve
    fall, (first, *_, last) = curve.fall, curve.shares
    if fall.low <= 0:
        return [
            (
                "More text did not help",
                f" as far as these trials tell: from {SHARE}={first:g} to {last:g} validation "
                f"loss changed by {-fall.middle:+.3f} bits per byte (95%: {-fall.high:+.3f} to "
                f"{-fall.low:+.3f}). So they cannot tell what even more text would bring, or "
                "what other settings are worth in text.",
            )
        ]
    lines = [_doubled(found), _fit(found)]
    lines += [_worth(found, recipe, share) for recipe, share in _compared(found)]
    return [*lines, *_beyond_curve(found), *_cut_off(found)]


def _doubled(found: TextShares) -> tuple[str, str]:
    curve = found.curve
    last = curve.shares[-1]
    now, then = curve.at(last), curve.at(2 * last)
    places = max(2, decimals(now.middle - then.middle))
    lead = "Twice the text" if last == 1 else f"Twice the text of {SHARE}={last:g}"
    return (
        f"{lead}:",
        f" {then.middle:.{places}f} bits per byte instead of {now.middle:.{places}f} "
        f"(95%: {then.low:.{places}f} to {then.high:.{places}f}).",
    )


def _fit(found: TextShares) -> tuple[str, str]:
    if found.curve.is_straight:
        return (
            "Fitted:",
            " a straight line over the logarithm of the share, with no floor in sight.",
        )
    floor = found.curve.floor
    return (
        "Fitted:",
        f" a power law of the share with a floor at {floor.middle:.2f} bits per byte "
        f"(95%: {floor.low:.2f} to {floor.high:.2f}).",
    )


def _compared(found: TextShares) -> Iterator[tuple[Recipe, float]]:
    """The other recipes with their shares on the curve except its end, which nothing can exceed."""
    for recipe in found.others:
        for share in recipe.losses:
            if found.curve.shares[0] <= share < found.curve.shares[-1]:
                yield recipe, share


def _worth(found: TextShares, recipe: Recipe, share: float) -> tuple[str, str]:
    assert found.plain
    changes, curve = recipe.differences(found.plain), found.curve
    paths = [path for path, value in recipe.values.items() if value != found.plain.values[path]]
    if all(path in AGAINST_OVERFITTING for path in paths):
        lead = f"What you did against overfitting ({changes})"
    else:
        lead = changes
    share_of = curve.needed(recipe.losses[share])
    low, middle, high = (one / share for one in (share_of.low, share_of.middle, share_of.high))
    least, most = curve.shares[0] / share, curve.shares[-1] / share
    on = f", with {SHARE}={share:g}"
    start = "less than " * (low < 1.01 * least)
    end = "more than " * (high > 0.99 * most)
    about = "more than " * (middle > 0.99 * most) or "less than " * (middle < 1.01 * least)
    times = f"{middle:.1f} times the text (95%: {start}{low:.1f} to {end}{high:.1f}){on}"
    # At the curve's smallest share, nothing below `least` can be measured.
    if low <= max(1.0, 1.01 * least) <= high:
        return lead, f" was worth {about}{times}, which is not a clear effect."
    if middle > 0.99 * most:
        low_end = f" (95%: more than {low:.1f})" if low < 0.99 * most else ""
        return lead, f" was worth more than {most:.1f} times the text{low_end}{on}."
    if middle < 1.01 * least:
        return lead, f" was worth less than {least:.1f} times the text{on}: it did harm."
    if high < 1:
        return lead, f" was worth {times}: it did harm."
    return lead, f" was worth as much as {times}."


def _beyond_curve(found: TextShares) -> _Lines:
    """A sentence on recipes that were run only at the curve's end."""
    assert found.plain
    compared = [recipe for recipe, _ in _compared(found)]
    beyond = [recipe.differences(found.plain) for recipe in found.others if recipe not in compared]
    if not beyond:
        return []
    rest = f" were run with {SHARE}={found.curve.shares[-1]:g} only, where the curve ends; to tell "
    return [("; ".join(beyond), f"{rest}what they are worth in text, run them with less of it.")]


def _cut_off(found: TextShares) -> _Lines:
    assert found.plain
    shares = ", ".join(f"{share:g}" for share in found.plain.cut_off)
    if not shares:
        return []
    return [
        (
            "Cut off by train.max_steps:",
            f" runs with {SHARE}={shares}. With more steps they might have got lower, and so "
            "might the end of the curve.",
        )
    ]


def text_figure(found: TextShares) -> Figure | None:
    """A figure of validation loss over the share of the text; None if there is no curve."""
    if found.plain is None:
        return None
    runs = "plain runs" + "; hollow: where twice the text leads" * (found.curve.fall.low > 0)
    legend = [("whole", runs)]
    legend += [
        (_role(number), recipe.differences(found.plain))
        for number, recipe in enumerate(found.others)
    ]
    unit = "bits per byte, over the share of the text; bar: 95%"
    wide, narrow = _picture(found, WIDE), _picture(found, NARROW)
    return Figure("text", "Validation loss by amount of text", unit, legend, wide, narrow)


def _picture(found: TextShares, width: int) -> Picture:
    assert found.plain
    curve, doubled = found.curve, found.curve.fall.low > 0
    first, last = curve.shares[0], curve.shares[-1] * (2 if doubled else 1)
    x = Scale(first / 1.1, last * 1.1, LEFT, width - RIGHT, is_log=True)
    recipes = [found.plain, *found.others]
    shown = [score(trial) for one in recipes for of in one.trials.values() for trial in of]
    ahead = curve.at(last)
    shown += [ahead.low, ahead.high] if doubled else []
    room = 0.08 * ((max(shown) - min(shown)) or 1.0)
    y = Scale(min(shown) - room, max(shown) + room, TALL - BOTTOM, TOP)
    shapes = _axes(found, x, y, last)
    curves = [line("curve whole", _points(found, first, curve.shares[-1], x, y))]
    if doubled:
        shapes += _ahead(ahead, last, x, y)
        curves.append(line("rung", _points(found, curve.shares[-1], last, x, y)))
    for number, recipe in enumerate(found.others):
        shapes += _dots(recipe, _role(number), x, y, recipe.differences(found.plain))
    shapes += _dots(found.plain, "whole", x, y, "")
    spoken = f"Validation loss of runs with {first:g} to {curve.shares[-1]:g} of the text"
    return Picture(width, TALL, spoken, shapes, curves, (), (x.start, y.end, x.end, y.start))


def _axes(found: TextShares, x: Scale, y: Scale, last: float) -> list[Shape]:
    shapes = grid(y, 6, x.start, x.end)
    free = 0.0
    for share in sorted({*found.curve.shares, last}):
        if x.at(share) > free:
            shapes.append(words("x", (x.at(share), y.start + 18), f"{share:g}"))
            free = x.at(share) + TICK_ROOM
    shapes.append(words("x", ((x.start + x.end) / 2, y.start + 36), SHARE))
    return [*shapes, line("axis", [(x.start, y.start), (x.end, y.start)])]


def _points(
    found: TextShares, first: float, last: float, x: Scale, y: Scale
) -> list[tuple[float, float]]:
    shares = [first * (last / first) ** (n / CURVE_POINTS) for n in range(CURVE_POINTS + 1)]
    return [(x.at(share), y.at(found.curve.at(share).middle)) for share in shares]


def _ahead(ahead: Interval, share: float, x: Scale, y: Scale) -> list[Shape]:
    """The prediction for twice the text, with its interval."""
    place, hint = x.at(share), f"{ahead.middle:.4f}, {ahead.low:.4f} to {ahead.high:.4f}"
    ends = [(place, y.at(ahead.low)), (place, y.at(ahead.high))]
    middle = (place, y.at(ahead.middle))
    return [line("reach whole", ends, hint), dot("dot whole hollow", middle, 4.5, hint)]


def _dots(recipe: Recipe, role: str, x: Scale, y: Scale, named: str) -> list[Shape]:
    """A dot for each run within the x axis's range."""
    return [
        dot(
            f"dot {role}",
            (x.at(share), y.at(score(one))),
            4,
            f"{one.name} {score(one):.4f} {named}",
        )
        for share, trials in recipe.trials.items()
        if x.low <= share <= x.high
        for one in trials
    ]


def _role(number: int) -> str:
    return ROLES[min(number, len(ROLES) - 1)]
