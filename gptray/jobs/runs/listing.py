"""Lists a storage path's runs, sweeps and evaluations with their results.

Reads the folders' own files (for an object store, copies of the records) without torch or Ray. A
damaged folder, or one that is not a run's, gets a line that says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptray.config import Config, RunFailed, UserError
from gptray.evaluation.model_commands import train_command
from gptray.evaluation.result import EVALUATION, load_evaluation
from gptray.jobs.models import CONFIG, has_model
from gptray.jobs.next_steps import of_model
from gptray.jobs.runs.record_places import RecordPlace, record_places
from gptray.reports.run.advice import advise
from gptray.reports.run.diagnosis import Diagnosis, diagnose, has_failed
from gptray.storage.record import METRICS, Event, read_events, read_metrics
from gptray.tuning.sweep_record import SKIPPED, TRIALS, load_trials, trial_dir, winner_dir
from gptray.tuning.trial_plan import choose_winner, score
from gptray.wording import count


@dataclass(frozen=True)
class Listed:
    """A folder of a storage path. path: its path or URI.

    kind: run, sweep, evaluation or other. val_loss: the best model's, in nats per token. val_bpb:
    in bits per byte. bytes: on disk. next: the command to run next, if any. problem: what is wrong
    with the folder, if anything; other fields may then be missing.
    """

    name: str
    path: str
    kind: str
    state: str = ""
    verdict: str = ""
    step: int | None = None
    val_loss: float | None = None
    val_bpb: float | None = None
    parameters: int | None = None
    bytes: int = 0
    changed: float = 0.0
    next: str = ""
    problem: str = ""


def listed(config: Config) -> list[Listed]:
    """Everything in `storage_path` except prepared text and hidden folders, newest first.

    Raises UserError for a storage path that cannot be listed.
    """
    with record_places(config) as places:
        return sorted([_listed(one) for one in places], key=lambda one: -one.changed)


def _listed(place: RecordPlace) -> Listed:
    known = Listed(
        place.folder.name,
        place.path,
        "other",
        bytes=place.bytes,
        changed=place.changed,
        problem=place.problem,
    )
    try:
        known = replace(known, kind=_kind(place.folder))
        return known if known.problem else _READERS[known.kind](place, known)
    except (UserError, RunFailed) as error:
        problem = str(error).splitlines()[0].replace(str(place.folder), place.path)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except Exception as error:  # a record may be damaged in any way
        problem = f"its record is damaged: {type(error).__name__}: {error}"
    return replace(known, problem=problem)


def _kind(folder: Path) -> str:
    for kind, file in (("sweep", TRIALS), ("run", CONFIG), ("evaluation", EVALUATION)):
        if (folder / file).is_file():
            return kind
    return "other"


def _run(place: RecordPlace, known: Listed) -> Listed:
    folder, config = place.folder, place.config()
    rows, events = read_metrics(folder), read_events(folder)
    diagnosis = diagnose(rows, config, events)
    state = _state(place, diagnosis, events)
    best = min(
        (row for row in rows if "val_loss" in row), key=lambda row: row["val_loss"], default=None
    )
    resumes = place.command("train", config)
    follows = resumes
    if state == "training":
        follows = ""
    elif diagnosis.ended == "non_finite":  # the same settings would fail again
        keys = advise(diagnosis, config)[0].keys
        follows = train_command(folder, config, keys, resumes=False) or ""
    elif diagnosis.ended in ("max_steps", "patience") and has_model(folder):
        follows = of_model(folder, place.path)["generate"]
        if diagnosis.verdict == "falling" and not diagnosis.landed:
            longer = f"train.max_steps={2 * config.train.max_steps}"
            follows = place.command("train", config, longer)
    return replace(
        known,
        state=state,
        verdict=verdict(diagnosis),
        step=diagnosis.last_step,
        val_loss=best and _finite(best["val_loss"]),
        val_bpb=best and _finite(best["val_bpb"]),
        parameters=diagnosis.parameters,
        next=follows,
    )


def _sweep(place: RecordPlace, known: Listed) -> Listed:
    folder = place.folder
    trials = [trial for trial in load_trials(folder) if trial.outcome != SKIPPED]
    winner = winner_dir(folder)
    follows = "" if place.is_held else place.command("tune", place.config())
    scored = [trial for trial in trials if trial.best]
    if winner or scored:
        best = winner or trial_dir(folder, min(scored, key=score).name)
        known = _run(RecordPlace(best, f"{place.path}/trials/{best.name}"), known)
        word = "trial" if winner is None else "winner"
        known = replace(known, verdict=f"{word} {best.name} {known.verdict}")
    if winner and has_model(folder):
        follows = of_model(folder, place.path)["generate"]
    if winner and not place.is_held:
        state = f"finished, {count(len(trials), 'trial')}"
    else:
        ended = sum(trial.outcome is not None for trial in trials)
        has_none = bool(trials) and ended == len(trials) and choose_winner(trials) is None
        word = "running" if place.is_held else "failed" if has_none else "interrupted"
        state = f"{word}, {ended} of {count(len(trials), 'trial')}"
    return replace(known, state=state, next=follows)


def _evaluation(place: RecordPlace, known: Listed) -> Listed:
    evaluation = load_evaluation(place.folder)
    assert evaluation
    split = evaluation["splits"]["val"] or evaluation["splits"]["test"]
    return replace(
        known,
        state="finished",
        verdict=f"of {evaluation['model_dir']}",
        val_loss=split and _finite(split["loss"]),
        val_bpb=split and _finite(split["bpb"]),
    )


def _other(place: RecordPlace, known: Listed) -> Listed:
    if (place.folder / METRICS).exists():
        return replace(known, problem=f"a run without its {CONFIG}")
    if has_model(place.folder):
        return replace(known, state="a model", next=of_model(place.folder, place.path)["generate"])
    return replace(known, problem=f"not a run: it has no {CONFIG}")


_READERS: dict[str, Callable[[RecordPlace, Listed], Listed]] = {
    "run": _run,
    "sweep": _sweep,
    "evaluation": _evaluation,
    "other": _other,
}


def _state(place: RecordPlace, diagnosis: Diagnosis, events: Sequence[Event]) -> str:
    if place.is_held:
        return "training"
    if diagnosis.ended is None:
        word = "failed" if has_failed(events) else "interrupted"
        return f"{word} at step {diagnosis.last_step:,}"
    return {"max_steps": "finished", "patience": "stopped early", "non_finite": "failed"}[
        diagnosis.ended
    ]


def verdict(diagnosis: Diagnosis) -> str:
    """The report's verdict in a few words."""
    turned = f"{diagnosis.turned.step:,}" if diagnosis.turned else ""
    landing = f", landed from step {diagnosis.landed.back_to:,}" if diagnosis.landed else ""
    word = {
        "none": "not evaluated yet",
        "single": "one evaluation only",
        "overfitting": f"overfits since step {turned}",
        "unsure": "rose at the end, too briefly to tell",
        "unstable": "unstable",
        "harmed": "better before training",
        "stuck": "has learned next to nothing",
        "falling": "does not overfit, still falling",
        "level": "does not overfit",
    }[diagnosis.verdict]
    return word + landing


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
