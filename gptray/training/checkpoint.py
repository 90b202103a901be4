"""Checkpoints that survive a crash at any instant and detect later damage.

A checkpoint is a folder `checkpoint_<step>` in the run folder: `model/` (Hugging Face's layout),
with `lora.rank` only `adapter/` (PEFT's), with `train.ema` `averaged/` too (the averaged weights),
`optimizer.safetensors`, `trainer.json`, `config.yaml` and, written last, `manifest.json` with every
file's size and sha256. It is built under another name, synced to disk and renamed, so a visible
checkpoint was complete once; the manifest reveals what has happened to it since (safetensors has no
checksum of its own).
Nothing is pickled. What the tensor files hold is up to the loop; without torch here, a driver can
inspect checkpoints at once.
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
from gptray.files import CannotWrite, remove, storing
from gptray.manifest import files_damage, sync, write_manifest
from gptray.model.adapter import ADAPTER
from gptray.model.adapter import CONFIG as ADAPTER_CONFIG
from gptray.model.adapter import WEIGHTS as ADAPTER_WEIGHTS
from gptray.record import EVENTS, read_rows
from gptray.training.trainer_state import TrainerState

# Folders of a checkpoint: its weights, and their average.
MODEL, AVERAGED = "model", "averaged"
WRITER_LOCK = ".writer.lock"
# No run can resume without these.
_NEEDED = ("trainer.json", "optimizer.safetensors")
_OF_MODEL = ("model/config.json", "model/model.safetensors")
_OF_ADAPTER = (f"{ADAPTER}/{ADAPTER_CONFIG}", f"{ADAPTER}/{ADAPTER_WEIGHTS}")


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
    """What is wrong with a checkpoint, or None if every file is as it was written."""
    weights = _OF_ADAPTER if (folder / ADAPTER).is_dir() else _OF_MODEL
    return files_damage(folder, needed=_NEEDED + weights) or _state_damage(folder)


def _state_damage(folder: Path) -> str | None:
    """What is wrong with the state in a checkpoint whose files are intact; None if nothing is."""
    try:
        state = TrainerState.load(folder)
    except ValueError as error:
        return f"trainer.json cannot be read ({error})"
    if state.step != checkpoint_step(folder):
        return f"trainer.json is for step {state.step}"
    return None


def newest_whole(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and a line for each newer one that is damaged.

    None means that the run has no checkpoint yet.
    Raises RunFailed if there are checkpoints and all of them are damaged.
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

    Raises UserError if there is none, and a model or evaluations show that there were some.
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
    """Write the checkpoint of `state.step` and return its folder, which appears whole.

    `write_tensors` writes `model/` and `optimizer.safetensors` to the folder it is given.
    Raises RunFailed where the disk takes no more, naming the path and the free space; earlier
    checkpoints are untouched, and the draft is removed.
    """
    final = checkpoint_folder(run_dir, state.step)
    draft = _draft(final)
    try:
        with storing(final):
            remove(draft)  # left by a killed attempt, never visible to a reader
            draft.mkdir(parents=True)
            write_tensors(draft)
            (draft / "trainer.json").write_text(state.to_json(), "utf-8")
            (draft / "config.yaml").write_text(config_yaml, "utf-8")
            write_manifest(draft)
            if os.path.lexists(final):  # a damaged one that this run has just replaced
                _set_aside(final)
            os.rename(draft, final)
            sync(run_dir)
    except CannotWrite:
        with suppress(OSError):
            remove(draft)
        raise
    return final


def publish_folder(source: Path, target: Path) -> None:
    """Put the files of a folder into another, each of which appears whole; weights last.

    Raises RunFailed where the disk takes no more: the next start publishes them.
    """
    with storing(target):
        if target.is_symlink() or not target.is_dir():
            _swap(source, target)
        else:
            _replace_files(source, target)
        sync(target.parent)


def exchange_model(source: Path, folder: Path) -> None:
    """Replace the `model/` of `folder` by that of `source`, whatever its shape.

    Raises RunFailed where the disk takes no more: `model/` is as it was.
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
    # Weights last: they alone differ within a run, and one replace swaps them.
    for file in sorted(source.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        draft = target / f".{file.name}.tmp"
        try:
            shutil.copyfile(file, draft)
            os.replace(draft, target / file.name)
        finally:
            draft.unlink(missing_ok=True)


def withdraw_checkpoint(run_dir: Path, step: int) -> None:
    """Make a checkpoint a draft again, so that nothing resumes from it.

    The next attempt at this step takes its place.
    """
    final = checkpoint_folder(run_dir, step)
    with storing(final):
        remove(_draft(final))
        os.rename(final, _draft(final))
        sync(run_dir)


def prune(run_dir: Path, num_to_keep: int, *, spare: Collection[int]) -> None:
    """Keep the newest `num_to_keep` checkpoints and those of the steps to spare.

    A folder is hidden by a rename before it is deleted, so that a kill leaves no partial one.
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
