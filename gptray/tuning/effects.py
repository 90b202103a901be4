"""The effect of each setting of a sweep on validation loss and on the gap.

Prepares the input of the regression in `gptray.tuning.regression` and decides which levels have
enough trials to be compared. The report puts the effects into words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptray.storage.record import MetricsRow
from gptray.tuning import levels
from gptray.tuning.levels import Setting
from gptray.tuning.regression import Flags, Floats, Stage, sample_effects
from gptray.tuning.sweep_record import Sweep, Trial, rungs

# The fewest trials to compare at all, and the fewest of a level at a step after the first.
ENOUGH, ENOUGH_GONE_ON = 8, 2
# The fewest trials that must reach a step for a comparison there.
ENOUGH_AT_STEP = 6
TAILS = (0.025, 0.975)  # an interval leaves these out


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% credible interval, in bits per byte."""

    low: float
    middle: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class EffectSize:
    """A level's effect at a step relative to the reference; negative is better."""

    step: int
    loss: Interval
    gap: Interval


@dataclass(frozen=True)
class Effect:
    """A level of a setting compared with the setting's reference.

    trials, against: the number of compared trials of the level and of the reference. last: the
    effect at the last step that enough of both reached; first: at the first step. Both are None if
    there are too few trials.
    """

    setting: Setting
    level: int
    trials: int
    against: int
    last: EffectSize | None
    first: EffectSize | None


@dataclass(frozen=True)
class Effects:
    """The effects of all levels but the references.

    steps: at which trials were compared. reached: how many trials reached each step.
    """

    steps: tuple[int, ...]
    reached: tuple[int, ...]
    of: tuple[Effect, ...]


def effects_of(sweep: Sweep, settings: Sequence[Setting]) -> Effects:
    """Compare the levels of all settings, without repetitions and trials that went wrong.

    A trial's loss at a step is its lowest so far, its gap that of its last evaluation so far. A
    trial that ended by itself before a step counts there with its final values.
    """
    steps = [*rungs(sweep.config), sweep.config.train.max_steps]
    sound = [
        trial
        for trial in sweep.trials
        if trial.outcome not in ("diverged", "failed") and not trial.replicate_of
    ]
    trials = [trial for trial in sound if _measured(trial, steps[0])]
    stages = [_stage(trials, step) for step in steps]
    reached = [int(stage.reached.sum()) for stage in stages]
    used = 1 + sum(count >= ENOUGH_AT_STEP for count in reached[1:])
    comparison = _Comparison(trials, steps[:used], stages[:used], settings, sweep.config.seed)
    return Effects(
        steps=tuple(steps[:used]),
        reached=tuple(reached[:used]),
        of=tuple(
            comparison.effect(setting, level)
            for setting in settings
            for level in range(len(setting.levels))
            if level != setting.reference
        ),
    )


def gap_bits(row: MetricsRow) -> float:
    """The gap of an evaluation in bits per byte, converted from nats as its loss is."""
    return float(row["gap"] * row["val_bpb"] / row["val_loss"])


def _measured(trial: Trial, step: int) -> tuple[float, float] | None:
    """A trial's loss and gap at a step; None if it has not reached the step."""
    evaluations = [row for row in trial.rows if "val_bpb" in row]
    until = [row for row in evaluations if row["step"] <= step]
    is_whole = trial.outcome in ("finished", "patience")
    if not until or not (is_whole or evaluations[-1]["step"] >= step):
        return None
    return min(row["val_bpb"] for row in until), gap_bits(until[-1])


def _stage(trials: Sequence[Trial], step: int) -> Stage:
    found = [_measured(trial, step) for trial in trials]
    values = np.array([one or (0.0, 0.0) for one in found]).reshape(len(trials), 2)
    return Stage(np.array([one is not None for one in found], bool), values)


class _Comparison:
    """The regression's draws; `codes` maps each setting's levels to values of its columns."""

    def __init__(
        self,
        trials: Sequence[Trial],
        steps: Sequence[int],
        stages: Sequence[Stage],
        settings: Sequence[Setting],
        seed: int,
    ) -> None:
        self.trials, self.steps, self.stages = trials, steps, stages
        codes, blocks, group = dict[str, dict[int, Floats]](), [], list[int]()
        for setting in settings:
            coded = _codes(setting, trials)
            if len(coded) < 2:
                continue
            nothing = np.zeros_like(next(iter(coded.values())))
            places = [setting.of.get(trial.name) for trial in trials]
            rows = [nothing if place is None else coded[place] for place in places]
            blocks.append(np.array(rows))
            group += [len(codes)] * len(nothing)
            codes[setting.name] = coded
        self.codes, self.draws = codes, list[Floats]()
        if len(trials) >= ENOUGH and blocks:
            design = np.concatenate(blocks, axis=1)
            self.draws = sample_effects(design, np.array(group), stages, seed=seed)

    def effect(self, setting: Setting, level: int) -> Effect:
        """A level of a setting compared with the setting's reference."""
        own, other = self._members(setting, level), self._members(setting, setting.reference)
        worth = []
        for number in range(len(self.draws)):
            least = ENOUGH_GONE_ON if number else levels.ENOUGH
            there = self.stages[number].reached
            if min((own & there).sum(), (other & there).sum()) < least:
                break
            worth.append(self._worth(number, setting, level))
        return Effect(
            setting,
            level,
            int(own.sum()),
            int(other.sum()),
            last=worth[-1] if worth else None,
            first=worth[0] if worth else None,
        )

    def _members(self, setting: Setting, level: int) -> Flags:
        return np.array([setting.of.get(trial.name) == level for trial in self.trials], bool)

    def _worth(self, number: int, setting: Setting, level: int) -> EffectSize:
        names = list(self.codes)
        widths = [len(next(iter(coded.values()))) for coded in self.codes.values()]
        place = names.index(setting.name)
        first = sum(widths[:place])
        coded = self.codes[setting.name]
        difference = coded[level] - coded[setting.reference]
        columns = self.draws[number][:, first : first + widths[place]]  # (draws, columns, outcomes)
        ends = np.quantile(np.einsum("dco,c->do", columns, difference), (0.5, *TAILS), axis=0)
        loss, gap = (Interval(low, middle, high) for middle, low, high in ends.T.tolist())
        return EffectSize(self.steps[number], loss, gap)


def _codes(setting: Setting, trials: Sequence[Trial]) -> dict[int, Floats]:
    """The row of each level that occurs in trials: one-hot columns, centred.

    Trials without the setting have zeros. Two levels share one column, of the same spread.
    """
    places = [setting.of[trial.name] for trial in trials if trial.name in setting.of]
    present, counts = np.unique(np.array(places, int), return_counts=True)
    rows = np.eye(len(present)) - counts / max(1, counts.sum())
    if len(present) == 2:
        rows = rows[:, 1:] * np.sqrt(2)
    return dict(zip(present.tolist(), rows, strict=True))
