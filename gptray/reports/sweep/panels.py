"""A small figure for each setting: each trial's lowest loss by its value of the setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gptray.reports.picture import Figure, Picture, Scale, Shape, dot, grid, words
from gptray.reports.sweep.learning import hint, role_of
from gptray.tuning.levels import Setting
from gptray.tuning.ranking import Ranking
from gptray.tuning.sweep_record import Trial
from gptray.tuning.trial_plan import score
from gptray.wording import shortened

# A panel's size and margins.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 250, 150, 40, 10, 8, 24
LETTERS, LETTER = 27, 6.8  # letters in a row of labels, and a letter's width
ROW = 14  # height of a row of labels
OUT_OF_PANEL = 0.9  # trials worse than this share of all are drawn at the panel's top

# Each trial's x, and the labels below: (x, row, text).
_Columns = tuple[Mapping[str, float], Sequence[tuple[float, int, str]]]


def panel_figures(standing: Ranking) -> list[Figure]:
    """A figure for each setting, all with the same loss scale."""
    measured = {trial.name: trial for trial in standing.trials if trial.best}
    scores = sorted(score(trial) for trial in measured.values())
    if not scores:
        return []
    top = scores[math.ceil(OUT_OF_PANEL * len(scores)) - 1]
    room = 0.12 * ((top - scores[0]) or scores[0] or 1.0)
    y = Scale(scores[0] - room, top + room, HEIGHT - BOTTOM, TOP)
    found = []
    for setting in standing.settings:
        trials = [trial for name, trial in measured.items() if name in setting.values]
        if trials:
            picture = _picture(standing, setting, trials, y)
            found.append(Figure("", setting.name, "", (), picture))
    return found


def _picture(standing: Ranking, setting: Setting, trials: Sequence[Trial], y: Scale) -> Picture:
    # The trials that matter most are in front.
    order = ["wrong", "cut", "whole", "own", "winner"]
    trials = sorted(trials, key=lambda trial: order.index(role_of(trial, standing)))
    names = [trial.name for trial in trials]
    places, labels = (_by_option if setting.entry.options else _by_value)(setting, names)
    shapes = grid(y, 3, LEFT, WIDTH - RIGHT, gap=5)
    shapes += [_label(place, row, text) for place, row, text in labels]
    shapes += [_dot(trial, places[trial.name], y, standing) for trial in trials]
    spoken = f"{setting.name}: lowest validation loss of {len(trials)} trials by value"
    return Picture(WIDTH, HEIGHT + ROW * max(row for _, row, _ in labels), spoken, shapes)


def _label(x: float, row: int, text: str) -> Shape:
    y = HEIGHT - 8 + ROW * row
    if x + len(text) * LETTER / 2 > WIDTH:
        return words("x end", (WIDTH, y), text)
    return words("x", (x, y), text)


def _dot(trial: Trial, x: float, y: Scale, standing: Ranking) -> Shape:
    role = role_of(trial, standing)
    css = f"dot {role}" + " hollow" * (trial.outcome == "stopped")
    radius = 4.5 if role in ("own", "winner") else 3
    return dot(css, (x, y.clamped(score(trial))), radius, hint(trial, standing))


def _by_option(setting: Setting, names: Sequence[str]) -> _Columns:
    """A column for each option, with its trials side by side."""
    room = (WIDTH - LEFT - RIGHT) / len(setting.levels)
    places = {}
    for level in range(len(setting.levels)):
        inside = sorted(name for name in names if setting.of[name] == level)
        for number, name in enumerate(inside):
            part = (number + 1) / (len(inside) + 1) - 0.5
            places[name] = LEFT + room * (level + 0.5 + 0.6 * part)
    letters = max(3, LETTERS // len(setting.levels))
    # Two rows give each label twice the room.
    rows = 2 if max(map(len, setting.levels)) > letters else 1
    return places, [
        (LEFT + room * (level + 0.5), level % rows, shortened(name, rows * letters, mark="\u2026"))
        for level, name in enumerate(setting.levels)
    ]


def _by_value(setting: Setting, names: Sequence[str]) -> _Columns:
    """Trials along the range; values that are not numbers are at the left."""
    entry = setting.entry
    is_log = entry.kind == "loguniform"
    high = entry.high - (entry.kind == "randint")  # randint excludes its upper end
    x = Scale(entry.low, high, LEFT + 8, WIDTH - RIGHT, is_log=is_log)
    middle = math.sqrt(entry.low * high) if is_log else (entry.low + high) / 2
    values = {name: setting.values[name] for name in names}
    # The config's own value may lie beyond the range, or be null.
    places = {
        name: x.clamped(value) if isinstance(value, (int, float)) else LEFT - 4
        for name, value in values.items()
    }
    return places, [(x.at(value), 0, f"{value:.3g}") for value in (entry.low, middle, high)]
