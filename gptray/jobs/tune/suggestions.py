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
from gptray.tuning.sweep_record import Record, load_trials
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
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # What Optuna was told of: each trial as it was then.
        self._told = {trial.name: trial for trial in load_trials(folder) if trial.outcome}
        self._search = self._informed()

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
            values = _values(self._entries, point)
            try:
                planned: Planned | None = plan_trial(
                    self._config, seen_at(self._config), name, values
                )
            except ConfigError as error:
                planned, why = None, str(error)
            steps = (planned.config if planned else self._config).train.max_steps
            self._record.planned(name, values, max_steps=steps, point=point)
            if planned:
                return planned
            self._record.ended(name, "failed", step=0, message=why)
            self.over(name)

    def over(self, name: str) -> None:
        """Tell Optuna what a trial has come to, in the place of what it was told before."""
        (trial,) = (one for one in load_trials(self._folder) if one.name == name)
        if trial.point is None:
            return  # not one of Optuna's
        is_known, self._told[name] = name in self._told, trial
        if is_known:  # it has gone on from a rung, and a study takes no second value
            self._search = self._informed()
        elif trial.best:
            self._search.on_trial_complete(name, {METRIC: score(trial)})
        else:
            self._search.on_trial_complete(name, error=True)

    def _informed(self) -> OptunaSearch:
        """A search that was told of all that are over, and has asked for those that are not."""
        trials = load_trials(self._folder)
        points = {trial.name: dict(trial.point) for trial in trials if trial.point is not None}
        running = [name for name in points if name not in self._told]
        search = OptunaSearch(
            _distributions(self._entries),
            metric=METRIC,
            mode="min",
            points_to_evaluate=[points[name] for name in running] or None,
            # Random draws at the start are a function of the seed, which is not to give them again.
            seed=(self._config.seed + len(trials)) % 2**32,
        )
        for name in running:
            search.suggest(name)  # its point
        for name, point in points.items():
            if told := self._told.get(name):
                search.add_evaluated_point(point, score(told), error=told.best is None)
        return search


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
        if entry.is_active(values):
            values |= entry.at((place + 0.5) / len(entry.options) if entry.options else place)
    return values
