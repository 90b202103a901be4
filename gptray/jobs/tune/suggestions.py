"""Trials that Optuna suggests one after the other, from what those before came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from ray.tune.search.optuna import OptunaSearch

from gptray.config import Config, ConfigError
from gptray.config.search_space import Entry
from gptray.jobs.run_folder import seen_at
from gptray.tuning.sweep_record import Record, Trial, load_trials
from gptray.tuning.trial_plan import Planned, entries_of, plan_trial, score, trial_name

METRIC = "val_bpb"


class Suggestions:
    """Asks Ray's OptunaSearch for the trials that a sweep still lacks, and plans them.

    A point of Optuna's space has, by an entry's first path, an option's number or a place in
    [0, 1) of a range; the record keeps it for Optuna to learn from when the sweep resumes.
    """

    def __init__(self, config: Config, folder: Path, record: Record, *, num_trials: int) -> None:
        """Tell Optuna of the trials in `folder`; there are to be `num_trials`."""
        self._config, self._folder, self._record = config, folder, record
        self._num_trials = num_trials
        self._entries = entries_of(config)
        past = load_trials(folder)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Random draws at the start are a function of the seed, which is not to give them again.
        self._search = OptunaSearch(
            _distributions(self._entries),
            metric=METRIC,
            mode="min",
            seed=(config.seed + len(past)) % 2**32,
        )
        self._asked: set[str] = set()
        for trial in past:
            if trial.outcome:
                self._tell_again(trial)

    def suggest(self) -> Planned | None:
        """The next trial, written down; None once there are enough.

        Values that don't go together make a trial that has failed, and the next is asked for.
        """
        while True:
            trials = load_trials(self._folder)
            if sum(one.replicate_of is None for one in trials) >= self._num_trials:
                return None
            name = trial_name(len(trials))
            point = self._search.suggest(name)
            self._asked.add(name)
            values = _values(self._entries, point)
            try:
                planned = plan_trial(self._config, seen_at(self._config), name, values)
            except ConfigError as error:
                self._record.planned(
                    name, values, max_steps=self._config.train.max_steps, point=point
                )
                self._record.ended(name, "failed", step=0, message=str(error))
                self.over(name)
                continue
            self._record.planned(
                name, values, max_steps=planned.config.train.max_steps, point=point
            )
            return planned

    def over(self, name: str) -> None:
        """Tell Optuna what a trial has come to."""
        (trial,) = (one for one in load_trials(self._folder) if one.name == name)
        if name not in self._asked:
            self._tell_again(trial)  # also what has gone on from a rung
            return
        self._asked.remove(name)
        if trial.best:
            self._search.on_trial_complete(name, {METRIC: score(trial)})
        else:
            self._search.on_trial_complete(name, error=True)

    def _tell_again(self, trial: Trial) -> None:
        """A trial that an earlier start had asked for."""
        if trial.point is not None:
            self._search.add_evaluated_point(
                dict(trial.point), score(trial), error=trial.best is None
            )


def _distributions(
    entries: Sequence[Entry],
) -> dict[str, CategoricalDistribution | FloatDistribution]:
    return {
        entry.paths[0]: CategoricalDistribution(tuple(range(len(entry.options))))
        if entry.options
        else FloatDistribution(0.0, 1.0)
        for entry in entries
    }


def _values(entries: Sequence[Entry], point: Mapping[str, float]) -> dict[str, object]:
    values: dict[str, object] = {}
    for entry in entries:
        place = point[entry.paths[0]]
        if entry.counts(values):
            values |= entry.at((place + 0.5) / len(entry.options) if entry.options else place)
    return values
