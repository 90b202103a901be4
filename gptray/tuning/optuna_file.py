"""`optuna.log`: a sweep as a study in Optuna's journal format, which optuna-dashboard opens.

The format is that of Optuna's JournalStorage with a JournalFileBackend: one operation per line. It
is written without Optuna, so that every sweep has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from gptray.config import load_config
from gptray.config.search_space import Entry
from gptray.storage.files import append, replacing, storing
from gptray.tuning.levels import Space, value_text
from gptray.tuning.sweep_record import SKIPPED, Trial, TrialEvent, load_trials, trial_events

OPTUNA = "optuna.log"
# optuna.storages.journal's JournalOperation, and TrialState's number for each outcome.
_STUDY, _STUDY_SYSTEM, _TRIAL, _STATE, _REPORT, _NOTE = 0, 3, 4, 6, 7, 8
_RUNNING, _WAITING = 0, 4
_STATES = {"finished": 1, "patience": 1, "stopped": 2, "diverged": 3, "failed": 3}
_MINIMIZE = 1

Json: TypeAlias = "str | int | float | bool | None | Sequence[Json] | Mapping[str, Json]"


def write_optuna_file(folder: Path) -> Path:
    """Bring `optuna.log` of a sweep's folder up to date; return its path.

    Its objective is the lowest validation loss in bits per byte. A trial that is still stopped at a
    rung at the end of the sweep is pruned; one that is retried after a failure is a new trial.
    A trial's evaluations are written when it ends, so that lines are only ever appended and an open
    dashboard can follow.
    """
    path = folder / OPTUNA
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in _lines(folder))
    data = text.encode()
    with storing(path):
        before = path.read_bytes() if path.exists() else b""
        if data.startswith(before):
            append(path, data[len(before) :])
        else:
            with replacing(path) as draft:
                draft.write_bytes(data)
    return path


def _lines(folder: Path) -> Iterator[dict[str, Json]]:
    space = Space(load_config(str(folder / "config.yaml"), []))
    trials = {trial.name: trial for trial in load_trials(folder)}
    distributions = {
        path: _distribution(entry, path, [space.own[path]] if path in space.own else [])
        for entry in space.entries
        for path in entry.paths
    }
    yield _line(_STUDY, study_name=folder.name, directions=[_MINIMIZE])
    yield _line(_STUDY_SYSTEM, study_id=0, system_attr={"study:metric_names": ["val_bpb"]})
    numbers: dict[str, int] = {}
    count = 0
    stopped: dict[str, TrialEvent] = {}  # they may still be promoted
    skipped: set[str] = set()  # they are still waiting in the study
    for event in trial_events(folder):
        if event["event"] == "winner":
            for name, end in stopped.items():
                yield from _ended(numbers[name], trials[name], end)
            stopped.clear()
            continue
        trial = trials.get(event.get("trial", ""))
        if trial is None:
            continue
        is_back = event["event"] == "promoted" and not stopped.pop(trial.name, None)
        if event.get("outcome") == SKIPPED:
            skipped.add(trial.name)
        elif event["event"] == "retried" and trial.name in skipped:
            skipped.remove(trial.name)
        elif is_back or event["event"] in ("planned", "retried"):
            numbers[trial.name], count = count, count + 1
            yield _created(trial, space.values(trial), distributions)
        elif event["event"] == "started":
            yield _state(numbers[trial.name], _RUNNING, datetime_start=_time(event))
        elif event.get("outcome") == "stopped":
            stopped[trial.name] = event
        elif event["event"] == "ended":
            yield from _ended(numbers[trial.name], trial, event)


def _line(operation: int, **fields: Json) -> dict[str, Json]:
    return {"op_code": operation, "worker_id": "gptray", **fields}


def _state(number: int, state: int, **fields: Json) -> dict[str, Json]:
    return _line(_STATE, **{"trial_id": number, "state": state, "values": None, **fields})


def _time(event: TrialEvent) -> str:
    return datetime.fromtimestamp(event["time"], UTC).isoformat(timespec="microseconds")


def _created(
    trial: Trial, values: Mapping[str, object], distributions: Mapping[str, Mapping[str, Json]]
) -> dict[str, Json]:
    params: dict[str, Json] = {}
    for path, value in values.items():
        inside = _inside(distributions[path], value)
        if inside is not None:
            params[path] = inside
    more = {"replicate_of": trial.replicate_of} if trial.replicate_of else {}
    return _line(
        _TRIAL,
        study_id=0,
        datetime_start=None,
        state=_WAITING,
        params=params,
        distributions={path: json.dumps(distributions[path]) for path in params},
        user_attrs={"trial": trial.name, **more},
    )


def _ended(number: int, trial: Trial, event: TrialEvent) -> Iterator[dict[str, Json]]:
    rows = [row for row in trial.rows if "val_bpb" in row and row["step"] <= event["step"]]
    for row in rows:
        yield _line(_REPORT, trial_id=number, step=row["step"], intermediate_value=row["val_bpb"])
    notes: dict[str, Json] = {"outcome": event["outcome"], "step": event["step"]}
    notes |= {"message": event["message"]} if event.get("message") else {}
    if rows:
        notes["best_step"] = min(rows, key=lambda row: row["val_bpb"])["step"]
    for key, value in notes.items():
        yield _line(_NOTE, trial_id=number, user_attr={key: value})
    # Optuna allows a failed trial no value, and requires one of a complete trial.
    state = _STATES[event["outcome"]] if rows else _STATES["failed"]
    is_failed = state == _STATES["failed"]
    values = None if is_failed else [min(row["val_bpb"] for row in rows)]
    yield _state(number, state, values=values, datetime_complete=_time(event))


def _distribution(entry: Entry, path: str, own: Sequence[object]) -> dict[str, Json]:
    """A path's distribution in Optuna's terms, extended to include `own`, the config's value."""
    if entry.options:
        place = entry.paths.index(path)
        choices: list[Json] = []
        for value in (*(option[place] for option in entry.options), *own):
            if _place(choices, value) is None:
                choices.append(_primitive(value))
        return _named("CategoricalDistribution", choices=choices)
    low, high = entry.low, entry.high - (entry.kind == "randint")
    for value in own:
        if isinstance(value, (int, float)):
            low, high = min(low, value), max(high, value)
    log = entry.kind == "loguniform" and low > 0
    if entry.kind == "randint":
        return _named("IntDistribution", low=int(low), high=int(high), log=False, step=1)
    return _named("FloatDistribution", low=low, high=high, log=log, step=None)


def _named(name: str, **attributes: Json) -> dict[str, Json]:
    return {"name": name, "attributes": attributes}


def _inside(distribution: Mapping[str, Json], value: object) -> Json:
    """A value in the journal's form: a choice by its index; None if it cannot be expressed."""
    attributes = distribution["attributes"]
    assert isinstance(attributes, Mapping)
    if "choices" in attributes:
        choices = attributes["choices"]
        assert isinstance(choices, list)
        return _place(choices, value)
    return value if isinstance(value, (int, float)) else None


def _place(choices: Sequence[Json], value: object) -> int | None:
    """The index of a value among the choices; 1 equals 1.0 but not true."""
    one = _primitive(value)
    for place, choice in enumerate(choices):
        if choice == one and isinstance(choice, bool) == isinstance(one, bool):
            return place
    return None


def _primitive(value: object) -> str | int | float | bool | None:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return value_text(value)
