"""A sweep's own record, `trials.jsonl`: its trials and the outcome of each.

One event per line, synced to disk before the sweep continues, so that a killed sweep knows what it
had decided. A trial's measurements are in its own run folder, `trials/<name>/`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack, cast

from gptray.config import Config, RunFailed, load_config
from gptray.evaluation.forgetting import Change, changes_of
from gptray.storage.files import append, storing
from gptray.storage.record import MetricsRow, RowFields, read_events, read_metrics, read_rows

TRIALS = "trials.jsonl"
# How a trial ends: at max_steps, by its own early stopping, at a rung until it is promoted, with a
# non-finite number, with an exception.
OUTCOMES = ("finished", "patience", "stopped", "diverged", "failed")
# The outcome of a trial that never starts because the sweep stops itself.
SKIPPED = "skipped"
# States of trials that have not ended, then of those that have.
STATES = ("waiting", "running", *OUTCOMES, SKIPPED)
# The fields that each event must have.
_FIELDS: RowFields = {
    "": {"event": str},
    "planned": {"trial": str, "values": dict, "max_steps": int},
    "started": {"trial": str},
    "ended": {"trial": str, "outcome": str, "step": int},
    "promoted": {"trial": str},
    "retried": {"trial": str},
    "enough": {"trials": int, "of": int, "gain": float, "gain_at_most": float, "min_gain": float},
    "winner": {"trial": str},
}


class TrialEvent(TypedDict, total=False):
    """A line of trials.jsonl; which fields it has depends on `event`.

    planned; started, again too; ended, also at a rung; promoted, so that it continues from a rung;
    retried, to run after it failed or was skipped: of a trial. reopened: the winner is to be
    decided again. enough: the sweep stops itself after `trials` of its trials. winner: it is over.
    """

    event: str
    time: float
    trial: str
    values: Mapping[str, object]  # planned: this and the next three
    max_steps: int
    replicate_of: str | None
    point: Mapping[str, float]  # Optuna's suggestion
    outcome: str  # ended: this, of OUTCOMES or SKIPPED, and the next three
    step: int
    message: str | None
    passing: bool  # the failure is transient
    num_samples: int  # reopened, if samples were added: this and the next
    before: int
    trials: int  # enough: this and the next four
    of: int
    gain: float
    gain_at_most: float
    min_gain: float


# A trial's name is also its folder's, so it must not lead out of the sweep.
_TRIAL = r"[\w-]+"


@dataclass(frozen=True)
class Trial:
    """One trial, planned or run. `outcome` is None while it waits or runs.

    values: its settings by dotted path; a path whose condition does not hold is missing.
    replicate_of: the trial that this one repeats with another seed.
    step: the last logged step.
    rows: its metrics.jsonl.
    point: Optuna's suggestion, in Optuna's own terms.
    passing: whether it failed for a transient reason: a full disk, a process that died.
    """

    name: str
    values: Mapping[str, object]
    max_steps: int
    replicate_of: str | None
    outcome: str | None
    started: bool
    step: int
    message: str | None
    rows: Sequence[MetricsRow]
    point: Mapping[str, float] | None = None
    passing: bool = False

    @property
    def state(self) -> str:
        """One of STATES."""
        return self.outcome or ("running" if self.started else "waiting")

    @property
    def has_ended(self) -> bool:
        """Whether it has run and is over, or waits at a rung."""
        return self.outcome not in (None, SKIPPED)

    @property
    def best(self) -> MetricsRow | None:
        """The evaluation with the lowest validation loss in bits per byte; None before any."""
        evaluations = [row for row in self.rows if "val_bpb" in row]
        return min(evaluations, key=lambda row: row["val_bpb"], default=None)

    @property
    def lost(self) -> float:
        """The share of the validation text that the trial's tokenizer loses."""
        return float(self.best.get("val_lost", 0.0)) if self.best else 0.0


@dataclass(frozen=True)
class Sweep:
    """A sweep as read from its folder. `winner` is None until the sweep is over.

    trials: without skipped ones.
    """

    folder: Path
    config: Config
    trials: Sequence[Trial]
    winner: str | None


def trial_dir(folder: Path, name: str) -> Path:
    """The run folder of a sweep's trial."""
    return folder / "trials" / name


def trial_changes(folder: Path, trial: Trial) -> list[Change]:
    """A trial's effect on its own text and those of evaluate.also; empty without the latter."""
    return changes_of(trial.rows, read_events(trial_dir(folder, trial.name)))


def trial_events(folder: Path) -> list[TrialEvent]:
    """The events of a sweep. Raises RunFailed if a line is damaged or names no valid trial."""
    events = cast(list[TrialEvent], read_rows(folder / TRIALS, _FIELDS))
    for event in events:
        if not re.fullmatch(_TRIAL, str(event.get("trial", "none"))):
            raise RunFailed(f"{folder / TRIALS}: invalid trial name {event['trial']!r:.40}")
    return events


def rungs(config: Config) -> list[int]:
    """The steps at which trials are compared and the worse ones wait, ascending, below max_steps.

    They are before any landing. These are the first bracket's; later ones skip the first rungs.
    """
    end = config.stable_steps + 1 if config.optim.lands else config.train.max_steps
    step = config.tune.grace_period * config.train.eval_interval
    found = []
    while step < end:
        found.append(step)
        step *= config.tune.reduction_factor
    return found


def load_sweep(folder: Path) -> Sweep:
    """Read a sweep's folder in its current state."""
    config, winner = load_config(str(folder / "config.yaml"), []), winner_dir(folder)
    trials = [trial for trial in load_trials(folder) if trial.outcome != SKIPPED]
    return Sweep(folder, config, trials, winner.name if winner else None)


def winner_dir(folder: Path) -> Path | None:
    """The run folder of a sweep's winner; None before there is one, and for other folders."""
    return _last_trial(folder, "winner", "reopened")


def published_dir(folder: Path) -> Path | None:
    """The run folder whose model is the sweep's: the winner's or, if reopened, the last winner's.

    None before the first winner, and for other folders.
    """
    return _last_trial(folder, "winner")


def _last_trial(folder: Path, *events: str) -> Path | None:
    named = [row.get("trial") for row in trial_events(folder) if row["event"] in events]
    return trial_dir(folder, named[-1]) if named and named[-1] else None


def samples_drawn(folder: Path) -> list[int]:
    """How many samples a sweep had after each round; empty unless tune.num_samples was raised."""
    raised = [row for row in trial_events(folder) if row.get("num_samples")]
    return [raised[0]["before"], *(row["num_samples"] for row in raised)] if raised else []


def load_trials(folder: Path) -> list[Trial]:
    """The trials of a sweep's folder in their current state, in order of planning."""
    by_trial: dict[str, dict[str, TrialEvent]] = {}
    for event in trial_events(folder):
        if "trial" not in event:
            continue
        events = by_trial.setdefault(event["trial"], {})
        events[event["event"]] = event
        if event["event"] in ("promoted", "retried"):
            events.pop("ended", None)
    return [_trial(folder, events) for events in by_trial.values() if "planned" in events]


def _trial(folder: Path, events: Mapping[str, TrialEvent]) -> Trial:
    not_yet: TrialEvent = {}
    planned, ended = events["planned"], events.get("ended", not_yet)
    rows = read_metrics(trial_dir(folder, planned["trial"]))
    return Trial(
        name=planned["trial"],
        values=planned["values"],
        max_steps=planned["max_steps"],
        replicate_of=planned.get("replicate_of"),
        outcome=ended.get("outcome"),
        started="started" in events,
        step=max(ended.get("step", 0), rows[-1]["step"] if rows else 0),
        message=ended.get("message"),
        rows=rows,
        point=planned.get("point"),
        passing=ended.get("passing", False),
    )


class Record:
    """The writer of a sweep's `trials.jsonl`; only the driver has one."""

    def __init__(self, folder: Path) -> None:
        """Open the record of a folder; an incomplete last line is dropped.

        Like `write`, raises RunFailed if the disk is full or not writable.
        """
        self._path = folder / TRIALS
        with storing(self._path):
            append(self._path, b"", cut_torn=True, sync=True)

    def write(self, event: str, /, **fields: Unpack[TrialEvent]) -> None:
        """Add an event with its fields and the time."""
        assert fields.get("outcome", SKIPPED) in (*OUTCOMES, SKIPPED), fields
        line = {"event": event, **fields, "time": round(time.time(), 3)}
        with storing(self._path):
            append(self._path, json.dumps(line, allow_nan=False).encode() + b"\n", sync=True)
