"""A sweep's standing: which trial leads, its baseline, and the steps run and saved.

Facts for the report's sections; the report puts them into sentences.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

from gptray.tuning.effects import Effect, Interval, effects_of
from gptray.tuning.levels import Setting, Space, settings_of
from gptray.tuning.sweep_record import Sweep, Trial
from gptray.tuning.trial_plan import ranked

# Why steps were not run.
SPARED = ("stopped", "patience", "wrong", "open")


class Ranking:
    """A sweep and what follows from its record, in its current state.

    trials: without repetitions; the best first, then those that cannot win, in order of planning.
    best: the winner or, before the end, the trial with the lowest loss so far. own: the trial that
    runs the config unchanged.
    """

    def __init__(self, sweep: Sweep) -> None:
        first = [trial for trial in sweep.trials if not trial.replicate_of]
        able = ranked(first)
        able_names = {trial.name for trial in able}
        by_name = {trial.name: trial for trial in first}
        self.sweep, self.space = sweep, Space(sweep.config)
        self.settings = settings_of(self.space, first)
        self.effects = effects_of(sweep, [one for one in self.settings if one.name != "seed"])
        self.trials = [*able, *(trial for trial in first if trial.name not in able_names)]
        self.repetitions = [trial for trial in sweep.trials if trial.replicate_of]
        self.best = by_name.get(sweep.winner or "", able[0] if able else None)
        self.own = next((one for one in first if self.space.is_own(one) and one.best), None)

    @property
    def steps_run(self) -> int:
        """Steps run by all trials together."""
        return sum(trial.step for trial in self.sweep.trials)

    @property
    def steps_full(self) -> int:
        """Steps of all trials together, had each run to its end."""
        return sum(trial.max_steps for trial in self.sweep.trials)

    def spared(self) -> dict[str, int]:
        """The steps that were not run, by reason: one of SPARED."""
        found: Counter[str] = Counter()
        for trial in self.sweep.trials:
            kind = "wrong" if is_wrong(trial) else trial.outcome or "open"
            found[kind] += max(0, trial.max_steps - trial.step)
        return {kind: found[kind] for kind in SPARED}

    def changes(self, trial: Trial) -> list[Setting]:
        """The settings in which a trial differs from the config."""
        values, own = self.space.values(trial), self.space.own
        return [
            setting
            for setting in self.settings
            if trial.name in setting.values
            and any(values[path] != own.get(path) for path in setting.entry.paths)
        ]

    def clear_effects(
        self, outcome: Literal["loss", "gap"], *, lower: bool
    ) -> list[tuple[Effect, Interval]]:
        """The effects in one direction whose intervals exclude zero, the largest first."""
        found = []
        for effect in self.effects.of:
            if effect.last:
                interval = effect.last.loss if outcome == "loss" else effect.last.gap
                if interval.excludes_zero and (interval.middle < 0) == lower:
                    found.append((effect, interval))
        return sorted(found, key=lambda one: -abs(one[1].middle))


def is_wrong(trial: Trial) -> bool:
    """Whether a trial diverged or failed."""
    return trial.outcome in ("diverged", "failed")
