"""Trials that Optuna suggests one by one, from the results of previous ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from ray.tune.search.optuna import OptunaSearch

from gptray.config import Config, ConfigError
from gptray.config.search_space import Entry
from gptray.jobs.folders.run_folder import run_place
from gptray.tuning.sweep_record import Record, load_trials
from gptray.tuning.trial_plan import Planned, entries_of, plan_trial, score, trial_name

METRIC = "val_bpb"


class Suggestions:
    """Asks Ray's OptunaSearch for a sweep's remaining trials, and plans them.

    A point of Optuna's space maps each entry's first path to an option's index, or to a position
    in [0, 1) of a range. The record keeps the points, for Optuna to learn from on resuming.
    """

    def __init__(self, config: Config, folder: Path, record: Record, *, num_trials: int) -> None:
        """Tell Optuna about the trials in `folder`, of a planned total of `num_trials`."""
        self._config, self._folder, self._record = config, folder, record
        self._num_trials = num_trials
        self._entries = entries_of(config)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # The trials that Optuna knows, as they were when it was told.
        self._told = {trial.name: trial for trial in load_trials(folder) if trial.outcome}
        self._search = self._informed()

    def suggest(self) -> Planned | None:
        """The next trial, recorded; None once there are enough.

        If its values contradict each other, the trial counts as failed and Optuna is asked again.
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
                    self._config, run_place(self._config), name, values
                )
            except ConfigError as error:
                planned, why = None, str(error)
            steps = (planned.config if planned else self._config).train.max_steps
            self._record.write("planned", trial=name, values=values, max_steps=steps, point=point)
            if planned:
                return planned
            self._record.write("ended", trial=name, outcome="failed", step=0, message=why)
            self.over(name)

    def over(self, name: str) -> None:
        """Tell Optuna a trial's result, replacing any earlier result."""
        (trial,) = (one for one in load_trials(self._folder) if one.name == name)
        if trial.point is None:
            return  # not one of Optuna's
        is_known, self._told[name] = name in self._told, trial
        if is_known:  # the trial was promoted, and a study takes no second value
            self._search = self._informed()
        elif trial.best:
            self._search.on_trial_complete(name, {METRIC: score(trial)})
        else:
            self._search.on_trial_complete(name, error=True)

    def _informed(self) -> OptunaSearch:
        """A new search that knows all ended trials' results, and has suggested the running ones."""
        trials = load_trials(self._folder)
        points = {trial.name: dict(trial.point) for trial in trials if trial.point is not None}
        running = [name for name in points if name not in self._told]
        space = {
            entry.paths[0]: CategoricalDistribution(tuple(range(len(entry.options))))
            if entry.options
            else FloatDistribution(0.0, 1.0)
            for entry in self._entries
        }
        search = OptunaSearch(
            space,
            metric=METRIC,
            mode="min",
            points_to_evaluate=[points[name] for name in running] or None,
            # Optuna's first draws depend only on the seed, so the same seed would repeat them.
            seed=(self._config.seed + len(trials)) % 2**32,
        )
        for name in running:
            search.suggest(name)  # suggests its point again
        for name, point in points.items():
            if told := self._told.get(name):
                search.add_evaluated_point(point, score(told), error=told.best is None)
        return search


def _values(entries: Sequence[Entry], point: Mapping[str, float]) -> dict[str, object]:
    values: dict[str, object] = {}
    for entry in entries:
        place = point[entry.paths[0]]
        if entry.is_active(values):
            values |= entry.at((place + 0.5) / len(entry.options) if entry.options else place)
    return values
