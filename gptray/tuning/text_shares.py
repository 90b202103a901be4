"""A sweep over the amount of text: groups its runs by share of the text and other settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from gptray.config import Config, flatten, override
from gptray.training.landing import rows_of
from gptray.tuning.levels import value_text
from gptray.tuning.sweep_record import Sweep, Trial
from gptray.tuning.text_curve import ENOUGH_SEEDS, ENOUGH_SHARES, Losses, TextCurve
from gptray.tuning.trial_plan import entries_of, score

SHARE, SEED = "data.fraction", "seed"


@dataclass(frozen=True)
class Recipe:
    """Completed runs that differ only in their share of the text and their seed.

    trials: by share, ascending. cut_off: shares with a run that train.max_steps ended while its
    loss may still have been falling.
    """

    values: Mapping[str, object]
    trials: Mapping[float, Sequence[Trial]]

    @property
    def losses(self) -> Losses:
        """Losses in bits per byte by share, for shares with enough seeds."""
        return {
            share: [score(trial) for trial in trials]
            for share, trials in self.trials.items()
            if len(trials) >= ENOUGH_SEEDS
        }

    @property
    def cut_off(self) -> list[float]:
        return [share for share, trials in self.trials.items() if any(map(_is_cut_off, trials))]

    def differences(self, other: Recipe) -> str:
        """The settings that differ from `other`, as on the command line."""
        return " and ".join(
            f"{path}={value_text(value)}"
            for path, value in self.values.items()
            if value != other.values[path]
        )


@dataclass(frozen=True)
class TextShares:
    """The completed runs of a sweep over data.fraction.

    plain: the recipe whose losses make the curve: the config's own or, if that has too few shares,
    the one with the most. None if no recipe has enough.
    others: recipes with enough seeds of a share within the curve's range, in the sweep's order.
    """

    plain: Recipe | None
    others: tuple[Recipe, ...]

    @classmethod
    def of(cls, sweep: Sweep) -> TextShares | None:
        """Group a sweep's trials; None if all have the same share of the text."""
        if SHARE not in (path for entry in entries_of(sweep.config) for path in entry.paths):
            return None
        bare = override(sweep.config, {"tune.space": []})  # or each override would check the space
        if len({trial.values.get(SHARE, bare.data.fraction) for trial in sweep.trials}) < 2:
            return None
        own = _key(_settings(bare, sweep, {}))
        found = _recipes(bare, sweep)
        able = [one for one in found.values() if len(one.losses) >= ENOUGH_SHARES]
        plain = found.get(own)
        if plain not in able:
            plain = max(able, key=lambda one: len(one.losses), default=None)
        if plain is None:
            return cls(None, ())
        low, *_, high = plain.losses
        others = [
            one
            for one in found.values()
            if one is not plain and any(low <= share <= high for share in one.losses)
        ]
        return cls(plain, tuple(others))

    @cached_property
    def curve(self) -> TextCurve:
        """The curve of `plain`, which must not be None."""
        assert self.plain
        return TextCurve(self.plain.losses)


def _is_cut_off(trial: Trial) -> bool:
    """Whether max_steps ended a trial whose stable part was best in its last quarter."""
    rows = [row for row in rows_of("stable", trial.rows) if "val_bpb" in row]
    best = min(rows, key=lambda row: row["val_bpb"])
    return trial.outcome == "finished" and 4 * best["step"] >= 3 * rows[-1]["step"]


def _recipes(bare: Config, sweep: Sweep) -> dict[str, Recipe]:
    """The sweep's recipes by `_key`, in the order of their first trials."""
    values: dict[str, Mapping[str, object]] = {}
    trials: dict[str, dict[float, list[Trial]]] = {}
    for trial in sweep.trials:
        if trial.outcome in ("finished", "patience") and trial.best:
            settings = _settings(bare, sweep, trial.values)
            share = override(bare, trial.values).data.fraction
            values[key := _key(settings)] = settings
            trials.setdefault(key, {}).setdefault(share, []).append(trial)
    return {key: Recipe(values[key], dict(sorted(by.items()))) for key, by in trials.items()}


def _settings(bare: Config, sweep: Sweep, values: Mapping[str, object]) -> dict[str, object]:
    """A trial's value for each path of the space except share and seed."""
    config = flatten(override(bare, values))
    paths = [path for entry in entries_of(sweep.config) for path in entry.paths]
    return {path: config[path] for path in paths if path not in (SHARE, SEED)}


def _key(values: Mapping[str, object]) -> str:
    return json.dumps(values, default=list)
