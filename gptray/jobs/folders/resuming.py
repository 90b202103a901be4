"""Checks what may change when a run or sweep is resumed, and that its records are intact.

Imports neither torch nor Ray: every mistake is reported before anything expensive starts.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptray.commands import typed
from gptray.config import Config, RunFailed, UserError, dump, flatten, load_config
from gptray.config.keys import shown, written
from gptray.data.chats import TEXT
from gptray.evaluation.model_commands import home_of
from gptray.jobs.folders.places import SOURCES, arguments_for, is_same_place, with_absolute_paths
from gptray.jobs.folders.run_folder import free_keys, run_dir, run_place
from gptray.jobs.models import CONFIG, TOKENIZER
from gptray.storage.driver_lock import LOCK, is_held
from gptray.storage.files import refuse_links, replacing, storing
from gptray.storage.record import EVENTS, METRICS, read_rows
from gptray.training.checkpoint import (
    WRITER_LOCK,
    check_not_lost,
    checkpoint_step,
    find_checkpoints,
    newest_intact,
)
from gptray.training.trainer_state import TrainerState
from gptray.tuning.sweep_record import TRIALS, samples_drawn

log = logging.getLogger("gptray")

# Keys that may change to train a run longer, or to give a sweep more trials.
LONGER = ("train.max_steps", "train.patience", "train.min_delta")
MORE = ("tune.num_samples", "tune.min_gain")
# Files and folders that jobs write to in place; through a link they would write elsewhere.
_WRITTEN = (LOCK, WRITER_LOCK, METRICS, EVENTS, TRIALS, "model", "tensorboard", "trials")
_ANEW = "to start from these weights, choose a new name and set model.init_from"
# Learning-rate schedules that end at train.max_steps.
_ENDING = ("linear", "cosine")


def check_resumable(config: Config, *, sweep: bool = False) -> list[str]:
    """A sentence for each key of LONGER or MORE that has changed since a run or a sweep started.

    Raises UserError, naming every other key that differs, or if the folder belongs to something
    else or the checkpoints are gone.
    """
    folder, place, what = run_dir(config), run_place(config), "sweep" if sweep else "run"
    refuse_links(folder, _WRITTEN, what=f"the {what}")
    visible = [path for path in folder.iterdir() if path.name[0] != "."] if folder.is_dir() else []
    if not visible:
        return []
    if config.train.resume == "never":
        raise UserError(
            f"train.resume=never: the {what} {place} exists; choose another name, or set "
            "train.resume=auto to resume it"
        )
    if not (folder / CONFIG).is_file():
        raise UserError(f"{place} exists and is not a {what} (no config.yaml); choose another name")
    if (folder / (METRICS if sweep else TRIALS)).exists():
        other = "run" if sweep else "sweep"
        raise UserError(f"{place} is a {other}, not a {what}; choose another name")
    if not sweep:
        check_not_lost(folder)
    saved = load_config(str(folder / CONFIG), [])
    before, now = flatten(saved), flatten(config)
    changed = {key: (before.get(key), now[key]) for key in now if before.get(key) != now[key]}
    for key in {*SOURCES, TOKENIZER}.intersection(changed):
        if is_same_place(*changed[key]):
            del changed[key]
    if {*changed.get("data.text_column", ())} == {None, TEXT}:
        del changed["data.text_column"]  # the tokens are compared, too
    if "train.compile" in changed and compiles(saved) == compiles(config):
        del changed["train.compile"]
    # A sweep's trials may have other rates, and then another tenth of them.
    if not sweep and saved.optim.final_lr == config.optim.final_lr:
        changed.pop("optim.min_lr", None)
    free, extends = free_keys(config, sweep=sweep), MORE if sweep else LONGER
    differing = [
        f"  {key}: {written(old)} there, {written(new)} now"
        for key, (old, new) in changed.items()
        if not key.startswith(free) and key not in extends
    ]
    if differing:
        raise UserError(
            f"the {what} {place} was started with other settings:\n"
            + "\n".join(differing)
            + "\nResume it with its own settings, or choose another name"
        )
    return _more_trials(folder, config, before) if sweep else _longer(folder, config, changed)


def compiles(config: Config) -> bool:
    """Whether the run's training step is compiled."""
    return config.train.compiles(on_gpu=config.compute.use_gpu)


def _longer(folder: Path, config: Config, changed: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """A sentence for each changed key of LONGER. Raises UserError for fewer steps than were run."""
    sentences = []
    steps = [checkpoint_step(one) or 0 for one in find_checkpoints(folder)]
    step = max(steps, default=0)
    for key in LONGER:
        if key not in changed:
            continue
        old, new = changed[key]
        verb = "changed"
        if key == "train.max_steps":
            if new < step:
                raise UserError(
                    f"train.max_steps={new}: the run {run_place(config)} has already made {step:,} "
                    f"steps; give {step} or more, or choose another name"
                )
            _check_room_to_land(config, step)
            verb = "raised" if new > old else "lowered"
        text = f"{key} {verb} from {shown(old)} to {shown(new)}"
        if key == "train.max_steps" and config.optim.schedule in _ENDING:
            text += f": the schedule is planned again from step {step}"
        sentences.append(text)
    return sentences


def _check_room_to_land(config: Config, step: int) -> None:
    """Raise UserError for too few steps for a run at `step` to land."""
    if config.stable_steps < step:
        steps = config.optim.cooldown_steps(step)
        raise UserError(
            f"train.max_steps={config.train.max_steps}: the run {run_place(config)} has made "
            f"{step:,} steps, and its cool-down takes up to {steps:,} more; give {step + steps} or "
            "more, or choose another name"
        )


def check_not_landing(config: Config, changes: Sequence[str], state: TrainerState | None) -> None:
    """Raise UserError for training a run longer that has begun to land."""
    if changes and state and state.landing:
        raise UserError(
            f"{'; '.join(changes)}: the run {run_place(config)} has begun to land after step "
            f"{state.landing.start:,}, so its stable part cannot continue; {_ANEW}"
        )


def _more_trials(folder: Path, config: Config, before: Mapping[str, object]) -> list[str]:
    """A sentence for each changed key of MORE. Raises UserError for fewer samples."""
    drawn = samples_drawn(folder)
    old = drawn[-1] if drawn else before["tune.num_samples"]
    assert isinstance(old, int)
    new = config.tune.num_samples
    if new < old:
        raise UserError(
            f"tune.num_samples={new}: the sweep {run_place(config)} has already drawn {old}; give "
            f"{old} or more, or choose another name"
        )
    sentences = []
    if new > old:
        sentences.append(
            f"tune.num_samples raised from {old} to {new}: existing trials stay, and the winner is "
            "chosen again"
        )
    least = before.get("tune.min_gain")
    if least != config.tune.min_gain:
        sentences.append(
            f"tune.min_gain changed from {shown(least)} to {shown(config.tune.min_gain)}: the "
            "sweep judges again whether more trials are worth it"
        )
    return sentences


def check_free(folder: Path, *, busy: str | None = None) -> None:
    """Raise UserError, like `held`, if another driver holds a folder; does not lock it."""
    if is_held(folder):
        raise UserError(busy or f"another process is training the run {folder}")


def check_records(folder: Path, state: TrainerState | None, *, log_interval: int) -> None:
    """Raise RunFailed for damaged records of a run, the basis of reports and results.

    Lost rows that only curves need cause a warning.
    """
    read_rows(folder / EVENTS)
    path, steps = folder / METRICS, [row["step"] for row in read_rows(folder / METRICS)]
    for before, step in itertools.pairwise(steps):
        if step <= before:
            raise RunFailed(
                f"{path} has the row of step {step} after that of step {before}; restore the file "
                "from a copy, or delete the row"
            )
    if state is None:
        return
    for step in {state.evaluated, state.progress.best_step} - {0, *steps}:
        raise RunFailed(f"{path} has lost the row of step {step}; restore it from a copy")
    lost = sorted({*range(log_interval, state.step, log_interval)} - {*steps})
    if lost:
        log.warning(
            "%s has lost %s of its rows, such as that of step %s; they are missing from the curves",
            path,
            f"{len(lost):,}",
            f"{lost[0]:,}",
        )


def save_config(config: Config, folder: Path) -> None:
    """Write the config.yaml of a new run, or of one whose keys have changed, atomically.

    Paths are made absolute, so that the run can be resumed from any folder. Previous configs are
    kept next to it as config.1.yaml, config.2.yaml and so on. Raises RunFailed if the disk is full.
    """
    path, text = folder / CONFIG, dump(with_absolute_paths(config))
    with storing(path):
        if path.exists():
            now, before = flatten(config), flatten(load_config(str(path), []))
            if not any(now[key] != before[key] for key in (*LONGER, *MORE)):
                return
            number = 1
            while (aside := folder / f"config.{number}.yaml").exists():
                number += 1
            with replacing(aside) as draft:
                shutil.copyfile(path, draft)
        with replacing(path) as draft:
            draft.write_text(text, "utf-8")


def state_of(run_dir: Path) -> TrainerState | None:
    """A run's state; None if it has no intact checkpoint."""
    try:
        checkpoint, _ = newest_intact(run_dir)
    except RunFailed:
        return None
    return TrainerState.load(checkpoint) if checkpoint else None


def is_finished(config: Config, folder: Path, state: TrainerState) -> bool:
    """Whether a run has ended and every checkpoint is scored."""
    if not state.is_over(config):
        return False
    rows = read_rows(folder / METRICS)
    return not config.train.async_validation or any(
        row["step"] == state.step and "val_loss" in row for row in rows
    )


def how_to_train_longer(config: Config, folder: Path, state: TrainerState) -> str:
    """The message about a finished run."""
    if state.landing:
        return f"this run has landed and is finished; {_ANEW}"
    longer = []
    if state.step >= config.train.max_steps:
        longer.append(f"train.max_steps={2 * state.step}")
    if state.progress.exhausted(config.train.patience):
        longer.append(f"train.patience={2 * state.progress.bad_evals}")
    return (
        f"this run is finished; to train it longer: {command('train', config, folder, *longer)}; "
        "for a new one, set train.resume=never and another name"
    )


def command(job: str, config: Config, folder: Path, *words: str) -> str:
    """The command that resumes the run or sweep in a folder, with extra arguments."""
    if home := home_of(config):
        words = ("--config", f"{home}/{CONFIG}", *words)
    else:
        words = ("--config", str(folder / CONFIG), *arguments_for(folder), *words)
    if config.train.resume == "never":
        words = (*words, "train.resume=auto")
    return typed(job, *words)
