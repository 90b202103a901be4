"""Checkpoints that survive a crash at any instant and detect later damage.

A checkpoint is a folder `checkpoint_<step>` in the run folder. It has `model/` (Hugging Face's
layout) or, with `lora.rank`, `adapter/` (PEFT's); with `train.ema` also `averaged/` (the averaged
weights); `optimizer.safetensors`, `trainer.json`, `config.yaml` and, written last, `manifest.json`
with every file's size and sha256. It is built under another name, synced to disk and renamed, so a
visible checkpoint was once complete; the manifest reveals later damage (safetensors has no checksum
of its own).

Nothing is pickled. The loop decides what the tensor files hold. This module does not import torch,
so a driver can inspect checkpoints quickly.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from gptray.config import RunFailed, UserError
from gptray.model.adapter import ADAPTER
from gptray.model.adapter import CONFIG as ADAPTER_CONFIG
from gptray.model.adapter import WEIGHTS as ADAPTER_WEIGHTS
from gptray.storage.files import CannotWrite, remove, storing
from gptray.storage.manifest import files_damage, sync, write_manifest
from gptray.storage.record import EVENTS, read_rows
from gptray.training.trainer_state import TrainerState

# A checkpoint's folders of weights and of averaged weights.
MODEL, AVERAGED = "model", "averaged"
WRITER_LOCK = ".writer.lock"
# A run cannot resume without these.
_STATE_FILES = ("trainer.json", "optimizer.safetensors")
_MODEL_FILES = ("model/config.json", "model/model.safetensors")
_ADAPTER_FILES = (f"{ADAPTER}/{ADAPTER_CONFIG}", f"{ADAPTER}/{ADAPTER_WEIGHTS}")


def checkpoint_step(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, or None for any other name."""
    match = re.fullmatch(r"checkpoint_([0-9]{6,12})", folder.name)
    step = int(match[1]) if match else 0
    return step if folder.name == f"checkpoint_{step:06d}" else None


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run_dir / f"checkpoint_{step:06d}"


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, intact or not, newest first."""
    if not run_dir.is_dir():
        return []
    found = [folder for folder in run_dir.iterdir() if checkpoint_step(folder) is not None]
    return sorted(found, key=lambda folder: checkpoint_step(folder) or 0, reverse=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is as it was written."""
    weights = _ADAPTER_FILES if (folder / ADAPTER).is_dir() else _MODEL_FILES
    return files_damage(folder, needed=_STATE_FILES + weights) or _state_damage(folder)


def _state_damage(folder: Path) -> str | None:
    """What is wrong with trainer.json, in a checkpoint whose files are intact; None if nothing."""
    try:
        state = TrainerState.load(folder)
    except ValueError as error:
        return f"trainer.json cannot be read ({error})"
    if state.step != checkpoint_step(folder):
        return f"trainer.json is for step {state.step}"
    return None


def newest_intact(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and a line for each newer one that is damaged.

    The checkpoint is None if the run has none yet. Raises RunFailed if all of them are damaged.
    """
    problems: list[str] = []
    for folder in find_checkpoints(run_dir):
        problem = damage(folder)
        if problem is None:
            return folder, problems
        problems.append(f"{folder.name} is damaged: {problem}")
    if problems:
        tried = "\n  ".join(problems)
        raise RunFailed(
            f"no checkpoint of {run_dir} is intact, so the run cannot resume. Tried:\n  {tried}\n"
            "Restore one of them from a copy, or start again under another name."
        )
    return None, problems


def check_not_lost(run_dir: Path) -> None:
    """Refuse to start over in the folder of a run whose checkpoints were removed.

    Raises UserError if there is no checkpoint, but a model or evaluations show that there was one.
    """
    model = run_dir / "model"
    if not run_dir.is_dir() or find_checkpoints(run_dir):
        return
    evaluated = any(event["event"] == "evaluated" for event in read_rows(run_dir / EVENTS))
    if model.exists() or evaluated:
        word = shlex.quote(f"model.init_from={model}")
        start = f"; {word} starts from its weights" if model.exists() else ""
        raise UserError(
            f"the checkpoints of the run {run_dir} are gone, so it cannot resume, and training "
            "from step 0 would overwrite its results. Restore one, or choose another name: "
            f"train.resume=never without a name picks a free one{start}"
        )


def save_checkpoint(
    run_dir: Path,
    state: TrainerState,
    *,
    config_yaml: str,
    write_tensors: Callable[[Path], None],
) -> Path:
    """Write the checkpoint of `state.step` atomically and return its folder.

    `write_tensors` writes `model/` and `optimizer.safetensors` to the folder it is given.
    If the disk is full, removes the draft, leaves earlier checkpoints untouched and raises
    RunFailed, which names the path and the free space.
    """
    final = checkpoint_folder(run_dir, state.step)
    draft = _draft(final)
    try:
        with storing(final):
            remove(draft)  # left by a killed attempt
            draft.mkdir(parents=True)
            write_tensors(draft)
            (draft / "trainer.json").write_text(state.to_json(), "utf-8")
            (draft / "config.yaml").write_text(config_yaml, "utf-8")
            write_manifest(draft)
            if os.path.lexists(final):  # damaged, and just trained again
                _set_aside(final)
            os.rename(draft, final)
            sync(run_dir)
    except CannotWrite:
        with suppress(OSError):
            remove(draft)
        raise
    return final


def publish_folder(source: Path, target: Path) -> None:
    """Copy a folder's files into another, each atomically and the weights last.

    Raises RunFailed if the disk is full; the next start publishes them again.
    """
    with storing(target):
        if target.is_symlink() or not target.is_dir():
            _swap(source, target)
        else:
            _replace_files(source, target)
        sync(target.parent)


def replace_model(source: Path, folder: Path) -> None:
    """Replace the `model/` of `folder` with that of `source`, whose shape may differ.

    Raises RunFailed if the disk is full, leaving `model/` as it was.
    """
    target = folder / "model"
    with storing(target):
        _swap(source / MODEL, target)
        sync(folder)


def _swap(source: Path, target: Path) -> None:
    draft, old = target.with_name(".model.tmp"), target.with_name(".model.old")
    for left in (draft, old):  # by a kill
        remove(left)
    try:
        shutil.copytree(source, draft)
        if os.path.lexists(target):
            os.rename(target, old)
        os.rename(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    remove(old)


def _replace_files(source: Path, target: Path) -> None:
    # Weights last: within a run only they differ, so a single replace swaps the model.
    for file in sorted(source.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        draft = target / f".{file.name}.tmp"
        try:
            shutil.copyfile(file, draft)
            os.replace(draft, target / file.name)
        finally:
            draft.unlink(missing_ok=True)


def withdraw_checkpoint(run_dir: Path, step: int) -> None:
    """Turn a checkpoint back into a draft, so that nothing resumes from it.

    The next attempt at this step replaces the draft.
    """
    final = checkpoint_folder(run_dir, step)
    with storing(final):
        remove(_draft(final))
        os.rename(final, _draft(final))
        sync(run_dir)


def prune(run_dir: Path, num_to_keep: int, *, spare: Collection[int]) -> None:
    """Remove all checkpoints but the newest `num_to_keep` and those of the steps in `spare`.

    A folder is renamed before it is deleted, so that a kill leaves no partial checkpoint.
    """
    with storing(run_dir):
        for folder in find_checkpoints(run_dir)[num_to_keep:]:
            if checkpoint_step(folder) not in spare:
                hidden = run_dir / f".{folder.name}.old"
                remove(hidden)
                os.rename(folder, hidden)
        for hidden in run_dir.glob(".checkpoint_*.old"):
            remove(hidden)


def _draft(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tmp")


def _set_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.damaged-{number}")).exists():
        number += 1
    os.rename(folder, aside)
