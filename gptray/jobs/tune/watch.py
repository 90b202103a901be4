"""Shows a sweep's progress: a live table on a terminal, otherwise a line per ended trial.

It follows the sweep's folder, as `gptray.jobs.train.watch` follows a run's.
"""

from __future__ import annotations

import collections
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gptray.config.keys import shown
from gptray.data.difference import percent
from gptray.jobs.cluster.ray_metrics import Exporter, run_tag
from gptray.jobs.progress.doing import following, telling
from gptray.storage.record import read_events
from gptray.tuning.sweep_record import STATES, Trial, load_trials, trial_dir
from gptray.tuning.trial_plan import ranked, score
from gptray.visible import visible
from gptray.wording import count, duration

log = logging.getLogger("gptray")
POLL_S = 1.0
# The shortest time between calls of on_change, since a report takes time from training.
CHANGE_S = 20.0
SHOWN = 12


class _SweepWatch:
    def __init__(self, folder: Path, num_trials: int, on_change: Callable[[], object]) -> None:
        self._folder, self._num_trials, self._on_change = folder, num_trials, on_change
        trials = load_trials(folder)
        self._told = {trial.name for trial in trials if trial.outcome}
        self._origin = (_steps(trials), time.monotonic())
        self._exporters: dict[str, Exporter] = {}
        self._seen, self._changed_at = -1, -CHANGE_S
        self._live: Live | None = None
        if sys.stderr.isatty():
            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            self._live.start()

    def look(self, *, last: bool = False) -> None:
        """Show what is new."""
        trials = load_trials(self._folder)
        for trial in trials:
            if trial.has_ended and trial.name not in self._told:
                log.info("%s", self._line(trial, trials))
        self._told = {trial.name for trial in trials if trial.outcome}
        self._export(trials)
        if self._live:
            self._live.update(self._table(trials), refresh=True)
        evaluations = sum("val_bpb" in row for trial in trials for row in trial.rows)
        is_due = time.monotonic() - self._changed_at >= CHANGE_S
        if evaluations + len(self._told) != self._seen and is_due and not last:
            self._seen, self._changed_at = evaluations + len(self._told), time.monotonic()
            self._on_change()

    def _export(self, trials: Sequence[Trial]) -> None:
        """Set the metrics of the sweep, and those of its running trials."""
        sweep = self._exporter(self._folder)
        states = collections.Counter(trial.state for trial in trials)
        for state in STATES:
            sweep.set("gptray_trials", states[state], state=state)
        sweep.set("gptray_trial_steps", _steps(trials))
        if best := ranked(trials):
            sweep.set("gptray_best_bpb", score(best[0]))
        for trial in trials:
            if trial.state == "running" and trial.rows:
                exporter = self._exporter(trial_dir(self._folder, trial.name))
                evaluated = [row for row in trial.rows if "val_loss" in row]
                for row in (*evaluated[-1:], trial.rows[-1]):
                    exporter.row(row)

    def _exporter(self, folder: Path) -> Exporter:
        tag = run_tag(folder)
        if tag not in self._exporters:
            self._exporters[tag] = Exporter(tag)
        return self._exporters[tag]

    def close(self) -> None:
        self.look(last=True)
        if self._live:
            self._live.stop()

    def line(self) -> str | None:
        """The sweep's progress, unless a table shows it."""
        if self._live:
            return None
        trials = load_trials(self._folder)
        going = [trial for trial in trials if trial.started and not trial.outcome]
        doing = ", ".join(f"{trial.name} {self._doing(trial)}" for trial in going[:SHOWN])
        return self._progress(trials) + (f"; running: {doing}" if going else "")

    def _doing(self, trial: Trial) -> str:
        """What a running trial does: a build takes a minute or more before the first step."""
        events = [] if trial.step else read_events(trial_dir(self._folder, trial.name))
        if events and events[-1]["event"] == "building":
            return "building the C++ kernels"
        return f"at step {trial.step:,}"

    def _line(self, trial: Trial, trials: Sequence[Trial]) -> str:
        text = f"trial {trial.name} {_state(trial)} at step {trial.step:,}"
        if trial.best:
            text += f", best {score(trial):.4f} bits per byte"
        if trial.lost:
            text += f", its tokenizer loses {percent(trial.lost)} of the text"
        if trial.message:
            text += f": {trial.message}"
        return f"{text}; {self._progress(trials)}"

    def _progress(self, trials: Sequence[Trial]) -> str:
        ended = [trial for trial in trials if trial.has_ended]
        total = max(self._num_trials, len(trials))
        text = f"{len(ended)} of {count(total, 'trial')}"
        best = ranked(trials)
        if best:
            text += f", best {best[0].name} with {score(best[0]):.4f}"
        steps, began = self._origin
        done = _steps(trials) - steps
        if done and ended:
            # Assume that the remaining trials need as many steps as those that ended.
            typical = sum(trial.step for trial in ended) / len(ended)
            going = [trial.step for trial in trials if not trial.outcome]
            left = (total - len(ended)) * typical - sum(min(step, typical) for step in going)
            text += f", eta {duration(left * (time.monotonic() - began) / done)}"
        return text

    def _table(self, trials: Sequence[Trial]) -> Table:
        table = Table(title=self._progress(trials), title_justify="left", box=None)
        for column in ("trial", "state", "step", "bits/byte", "at step", "settings"):
            is_number = column not in ("trial", "state", "settings")
            table.add_column(
                column,
                justify="right" if is_number else "left",
                no_wrap=column in ("trial", "step", "bits/byte"),
                overflow="fold",
            )
        running = [trial for trial in trials if trial.started and not trial.outcome]
        best = [trial for trial in ranked(trials) if trial not in running]
        for trial in [*running, *best[: max(3, SHOWN - len(running))]]:
            table.add_row(
                trial.name,
                _state(trial),
                f"{trial.step:,}/{trial.max_steps:,}",
                f"{score(trial):.4f}" if trial.best else "",
                f"{trial.best['step']:,}" if trial.best else "",
                Text(visible(_settings(trial))),  # as Text, or [b] in a path would be markup
            )
        return table


@contextmanager
def watching_sweep(
    folder: Path, num_trials: int, *, on_change: Callable[[], object]
) -> Iterator[None]:
    """Show the sweep's progress on stderr while the block runs.

    `on_change` is called now and then, from a thread, when there is something new.
    """
    watch = _SweepWatch(folder, num_trials, on_change)
    with closing(watch), following(watch.look, every_s=POLL_S), telling(watch.line):
        yield


def _settings(trial: Trial) -> str:
    return " ".join(f"{p.rpartition('.')[2]}={shown(v)}" for p, v in trial.values.items())


def _steps(trials: Sequence[Trial]) -> int:
    return sum(trial.step for trial in trials)


def _state(trial: Trial) -> str:
    if trial.outcome is None:
        return "runs" if trial.started else "waits"
    words = {"patience": "stopped by patience", "stopped": "stopped at a rung"}
    return words.get(trial.outcome, trial.outcome)
