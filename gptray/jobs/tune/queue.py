"""A running sweep's trials: which comes next, its process's input, and how it ended."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gptray.config import RunFailed, override
from gptray.data.tokens import TokenData
from gptray.jobs.cluster.own_ray import is_own_ray
from gptray.jobs.cluster.resources import trial_resources
from gptray.jobs.folders.origin import Origin
from gptray.jobs.folders.resuming import save_config
from gptray.jobs.folders.run_folder import run_place
from gptray.jobs.train.task import TrainTask, TrialTask
from gptray.jobs.tune.check import CheckedSweep
from gptray.jobs.tune.start import failed_trials
from gptray.storage.files import storing
from gptray.tuning.halving import Halving
from gptray.tuning.more_trials import Gain, expected_gain, judges
from gptray.tuning.sweep_record import SKIPPED, Record, Trial, load_trials, trial_dir
from gptray.tuning.trial_plan import Planned, plan_trial, replicates, text_key

if TYPE_CHECKING:
    from gptray.jobs.tune.suggestions import Suggestions

log = logging.getLogger("gptray")


class SweepQueue:
    """The trials of a sweep with prepared texts, for `gptray.jobs.tune.trials` to run."""

    def __init__(
        self,
        checked: CheckedSweep,
        record: Record,
        texts: Mapping[str, TokenData],
        also: Mapping[str, Mapping[str, Path]],
        publish: Callable[[], None],
        origin: Origin | None,
    ) -> None:
        """Record the planned trials, and queue first those that an earlier start had begun."""
        self._config, self._folder = checked.config, checked.folder
        self._record, self._publish, self._origin = record, publish, origin
        self.at_once, self.reserved = trial_resources(
            checked.config.compute,
            trials=checked.num_trials,
            at_once=checked.config.tune.max_concurrent_trials,
        )
        self._texts, self._also = texts, also
        self._suggestions: Suggestions | None = None
        self.is_over = False
        self.failure: RunFailed | None = None
        # New trials, which are skipped if more would gain too little, and running ones.
        self._fresh, self._running = set[str](), set[str]()
        self._too_little: Gain | None = None
        self._add_to_record(checked.trials)
        if self._config.tune.search_alg == "optuna":
            from gptray.jobs.tune.suggestions import Suggestions

            self._suggestions = Suggestions(
                self._config, self._folder, record, num_trials=checked.num_trials
            )
        past = load_trials(self._folder)
        self.halving = Halving(self._config, past)
        # Stopped at a rung, from which they may continue. A kill may have prevented the record.
        self._stopped = {trial.name for trial in past if trial.outcome == "stopped"}
        for trial in past:
            if trial.outcome is None and self.halving.waits(trial.name):
                self.ended(trial.name, "stopped", step=trial.step)
        waiting = [one for one in past if not one.outcome and one.name not in self._stopped]
        waiting.sort(key=lambda trial: not trial.started)
        self._waiting = deque(self._planned(trial) for trial in waiting)
        self._fresh |= {one.name for one in waiting if not one.started and not one.replicate_of}
        self._judge()

    def next(self) -> Planned | None:
        """The next trial to run; None while it depends on running ones, or if `is_over`."""
        if self.failure:
            self.is_over = True
            return None
        if promoted := self._promoted():
            return promoted
        if not self._waiting and self._suggestions:
            suggested = self._suggestions.suggest()
            self._waiting.extend([suggested] if suggested else [])
        if self._too_little and self._waiting and self._waiting[0].name in self._fresh:
            if self._running:
                return None  # their results count, too
            self._stop_itself(self._too_little)
        return self._given(self._waiting.popleft()) if self._waiting else self._at_the_end()

    def _given(self, planned: Planned) -> Planned:
        self._fresh.discard(planned.name)
        self._running.add(planned.name)
        return planned

    def _judge(self) -> None:
        """Judge, by the trials that have ended, whether new ones are worth running."""
        if not self._fresh or not judges(self._config):
            return
        before, gain = self._too_little, expected_gain(load_trials(self._folder))
        is_little = gain is not None and gain.most < self._config.tune.min_gain
        self._too_little = gain if is_little else None
        if self._too_little and not before and self._running:
            log.info(
                "no new trials for now: more may not be worth it; the sweep decides once the "
                "running ones have ended"
            )

    def _stop_itself(self, gain: Gain) -> None:
        """Skip all new trials. Those that wait at a rung may still continue."""
        first = [one for one in load_trials(self._folder) if one.replicate_of is None]
        left = [one for one in first if one.name in self._fresh or one.outcome == SKIPPED]
        self._record.write(
            "enough",
            trials=len(first) - len(left),
            of=len(first),
            gain=gain.mean,
            gain_at_most=gain.most,
            min_gain=self._config.tune.min_gain,
        )
        for name in sorted(self._fresh):
            self._record.write("ended", trial=name, outcome=SKIPPED, step=0)
        self._waiting = deque(one for one in self._waiting if one.name not in self._fresh)
        self._fresh.clear()

    def _at_the_end(self) -> Planned | None:
        """The next trial when no new ones are left: the best of each rung, then repetitions."""
        trials = load_trials(self._folder)
        if any(trial.outcome is None for trial in trials):
            return None
        # The best are unknown until trials that failed for a passing reason have been retried.
        if not failed_trials(self._config, self._folder):
            if promoted := self._promoted(last=True):
                return promoted
            repeated = replicates(self._config, run_place(self._config), trials)
            self._waiting.extend(self._add_to_record(repeated))
        self.is_over = not self._waiting
        return self._given(self._waiting.popleft()) if self._waiting else None

    def _promoted(self, *, last: bool = False) -> Planned | None:
        """Promote a trial that was stopped at a rung and may continue, if there is one."""
        name = self.halving.promote(self._stopped, last=last)
        if name is None:
            return None
        self._stopped.remove(name)
        self._record.write("promoted", trial=name)
        (trial,) = (one for one in load_trials(self._folder) if one.name == name)
        return self._given(self._planned(trial))

    def started(self, name: str) -> None:
        """Record that a trial has started, for the first time or again."""
        self._record.write("started", trial=name)

    def ended(
        self,
        name: str,
        outcome: str,
        *,
        step: int,
        message: str | None = None,
        passing: bool = False,
    ) -> None:
        """Record that a trial is over or waits at a rung. passing: the failure is transient."""
        self._record.write(
            "ended", trial=name, outcome=outcome, step=step, message=message, passing=passing
        )
        self.halving.ended(name, outcome)
        if outcome == "stopped":
            self._stopped.add(name)
        self._running.discard(name)
        self._judge()
        self._publish()
        if self._suggestions:
            self._suggestions.over(name)

    def _add_to_record(self, trials: Sequence[Planned]) -> list[Planned]:
        """Record the trials that are not in the record yet; return them."""
        known = {trial.name for trial in load_trials(self._folder)}
        new = [planned for planned in trials if planned.name not in known]
        for planned in new:
            self._record.write(
                "planned",
                trial=planned.name,
                values=planned.values,
                max_steps=planned.config.train.max_steps,
                replicate_of=planned.replicate_of,
            )
        return new

    def _planned(self, trial: Trial) -> Planned:
        planned = plan_trial(self._config, run_place(self._config), trial.name, trial.values)
        return replace(planned, replicate_of=trial.replicate_of)

    def task(self, planned: Planned) -> TrialTask:
        """The input of a trial's process; creates the trial's run folder."""
        config, cores = planned.config, self.reserved["CPU"]
        if cores.is_integer():
            # Sums depend on the number of threads, so a trial's config records it.
            config = override(config, {"compute.cpus_per_worker": int(cores)})
        folder = trial_dir(self._folder, planned.name)
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder)
        text = text_key(planned.config)
        run = TrainTask(
            config,
            self._texts[text].data_dir,
            folder,
            threads=max(1, int(cores)),
            may_lose_nodes=not is_own_ray(),
            origin=self._origin,
            also=self._also[text],
        )
        is_cut = planned.replicate_of is None
        return TrialTask(planned.name, run, is_cut, self.reserved)
