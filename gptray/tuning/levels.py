"""A sweep's settings as levels by which trials can be grouped.

Each option of a choice or grid is a level; a range is cut into parts with equally many trials.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from gptray.config import Config, ConfigError, flatten, override
from gptray.config.keys import shown
from gptray.config.search_space import Entry, is_number
from gptray.tuning.sweep_record import Trial
from gptray.tuning.trial_plan import entries_of

# The fewest trials of a level to compare it.
ENOUGH = 3
# The fewest trials in a part of a range, and the most parts.
PART, MOST_PARTS = 4, 3


class Space:
    """A sweep's search space: its entries, and the config's `own` values for paths that apply."""

    def __init__(self, config: Config) -> None:
        self.entries, self.own = entries_of(config), dict[str, object]()
        config = override(config, {"tune.space": []})  # or each override would check the space
        for entry in self.entries:
            if entry.is_active(self.own):
                self.own |= _own_values(entry, config)

    @property
    def paths(self) -> list[str]:
        return [path for entry in self.entries for path in entry.paths]

    def values(self, trial: Trial) -> dict[str, object]:
        """A trial's value for each path of the space; without values of its own, the config's."""
        given = trial.values or self.own
        return {path: given[path] for path in self.paths if path in given}

    def settings(self, trial: Trial) -> dict[str, object]:
        """Like `values`, with the seed of a repetition."""
        return {**self.values(trial), **trial.values}

    def is_own(self, trial: Trial) -> bool:
        """Whether a trial runs the config unchanged."""
        return self.values(trial) == self.own


@dataclass(frozen=True)
class Setting:
    """An entry of the space and how trials are grouped by it.

    levels: their names, ascending if they are numbers. of: each trial's index in `levels`; trials
    to which the entry does not apply are missing. reference: the level that the others are compared
    with: the config's own or, if that is rare, the most frequent. values: each trial's, a tuple if
    the entry's paths differ in value.
    """

    entry: Entry
    levels: tuple[str, ...]
    of: Mapping[str, int]
    reference: int
    values: Mapping[str, object]

    @property
    def name(self) -> str:
        """The entry's paths."""
        return ", ".join(self.entry.paths)


def settings_of(space: Space, trials: Sequence[Trial]) -> list[Setting]:
    """All settings of a sweep, in the space's order."""
    by_trial = {trial.name: space.values(trial) for trial in trials}
    found = []
    for entry in space.entries:
        values = {
            name: _joined([values[path] for path in entry.paths])
            for name, values in by_trial.items()
            if all(path in values for path in entry.paths)
        }
        is_counted = all(path in space.own for path in entry.paths)
        own = [_joined([space.own[path] for path in entry.paths])] if is_counted else []
        found.append((_by_option if entry.options else _by_part)(entry, values, own))
    return found


def assignment(setting: Setting, trial: str) -> str:
    """A trial's value of a setting, written as on the command line."""
    value, paths = setting.values[trial], setting.entry.paths
    if isinstance(value, tuple):
        pairs = zip(paths, value, strict=True)
        return " and ".join(f"{path}={value_text(one)}" for path, one in pairs)
    return " and ".join(f"{path}={value_text(value)}" for path in paths)


def value_text(value: object) -> str:
    """A setting's value as in a config, without quotes; a tuple has several paths' values."""
    if isinstance(value, tuple):
        return ", ".join(map(value_text, value))
    if isinstance(value, list):  # a split, or names
        words = list(map(value_text, value))
        return ":".join(words) if all(map(is_number, value)) else f"[{', '.join(words)}]"
    if isinstance(value, str):
        return value
    return f"{value:g}" if is_number(value) else shown(value)


def _own_values(entry: Entry, config: Config) -> dict[str, object]:
    """The config's values for the paths of an entry, in the space's spelling if it has them."""
    for option in entry.options:
        values = dict(zip(entry.paths, option, strict=True))
        try:
            if override(config, values) == config:
                return values
        except ConfigError:
            continue  # the option contradicts the config, so it is not the config's own
    own = flatten(config)
    plain = {path: own[path] for path in entry.paths}
    return {path: list(one) if isinstance(one, tuple) else one for path, one in plain.items()}


def _by_option(entry: Entry, values: Mapping[str, object], own: Sequence[object]) -> Setting:
    options: list[object] = []
    for option in map(_joined, entry.options):
        if option not in options:  # an option may be listed twice, to be drawn twice as often
            options.append(option)
    # The config's own value need not be an option.
    options += [one for one in own if one not in options and one in values.values()]
    of = {trial: options.index(value) for trial, value in values.items()}
    preferred = options.index(own[0]) if own and own[0] in options else None
    levels = tuple(map(value_text, options))
    return Setting(entry, levels, of, _reference(of, preferred), values)


def _by_part(entry: Entry, values: Mapping[str, object], own: Sequence[object]) -> Setting:
    """Group trials into parts of a range, equally many in each; equal values stay together."""
    numbers = sorted(value for value in values.values() if is_number(value))
    count = max(1, min(MOST_PARTS, len(numbers) // PART)) if numbers else 0
    starts = sorted({numbers[len(numbers) * part // count] for part in range(count)})
    names = []
    for first, after in zip_longest(starts, starts[1:], fillvalue=math.inf):
        last = max(number for number in numbers if number < after)
        ends = [f"{end:.2g}" if isinstance(end, float) else f"{end}" for end in (first, last)]
        names.append(" to ".join(ends if first < last else ends[:1]))
    # The config's own value may be null where the space has numbers.
    odd = [value for value in own if not is_number(value) and value in values.values()]

    def place(value: object) -> int:
        if not is_number(value):
            return len(starts)
        return max(0, bisect_right(starts, value) - 1)

    of = {trial: place(value) for trial, value in values.items()}
    preferred = place(own[0]) if own and (is_number(own[0]) or odd) else None
    return Setting(entry, (*names, *map(value_text, odd)), of, _reference(of, preferred), values)


def _reference(of: Mapping[str, int], preferred: int | None) -> int:
    """The config's own level if enough trials have it, otherwise the most frequent one."""
    counts = Counter(of.values())
    if preferred is not None and (counts[preferred] >= ENOUGH or not counts):
        return preferred
    return min(counts, key=lambda level: (-counts[level], level), default=0)


def _joined(values: Sequence[object]) -> object:
    """The paths' common value, or a tuple of their values."""
    return values[0] if all(value == values[0] for value in values) else tuple(values)
