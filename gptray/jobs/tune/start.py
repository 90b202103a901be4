"""Starts a sweep, for the first time or again: checks its texts and opens its record."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from gptray.config import Config, UserError, load_config
from gptray.data.tokens import TokenData
from gptray.jobs.folders.resuming import save_config, state_of
from gptray.jobs.folders.run_folder import run_place
from gptray.jobs.models import CONFIG
from gptray.jobs.train.check import check_data
from gptray.jobs.tune.check import CheckedSweep
from gptray.storage.files import storing
from gptray.tuning.sweep_record import (
    SKIPPED,
    Record,
    Trial,
    load_trials,
    samples_drawn,
    trial_dir,
    winner_dir,
)
from gptray.tuning.trial_plan import plan_trial, text_key
from gptray.wording import count

log = logging.getLogger("gptray")


def opened(checked: CheckedSweep) -> Record:
    """Open the record of a sweep that is about to run, noting what has changed since."""
    folder, failed = checked.folder, failed_trials(checked.config, checked.folder)
    skipped = [trial for trial in load_trials(folder) if trial.outcome == SKIPPED]
    if not (folder / CONFIG).exists():
        save_config(checked.config, folder)
    record = Record(folder)
    if checked.changes:
        drawn = samples_drawn(folder)
        before = drawn[-1] if drawn else load_config(str(folder / CONFIG), []).tune.num_samples
        record.write("reopened", before=before, num_samples=checked.config.tune.num_samples)
    elif winner_dir(folder):
        record.write("reopened")
    else:
        skipped = []
    save_config(checked.config, folder)
    for change in checked.changes:
        log.info("%s", change)
    for trial in (*failed, *skipped):
        record.write("retried", trial=trial.name)
    if failed:
        log.info("rerunning %s: %s", count(len(failed), "trial"), failed[0].message)
    _share_texts(folder)
    return record


def failed_trials(config: Config, folder: Path) -> list[Trial]:
    """The trials to run again because they failed for a transient reason."""
    if not config.tune.retry_failed:
        return []
    return [trial for trial in load_trials(folder) if trial.passing]


def check_trials(checked: CheckedSweep, texts: Mapping[str, TokenData]) -> None:
    """Raise UserError listing all texts that a trial cannot be trained on.

    Also compares texts with those of finished trials; one trial per text suffices.
    """
    problems: dict[str, str] = {}
    known = {one.name: one for one in load_trials(checked.folder)}
    planned = [one for one in checked.trials if one.name not in known]
    planned += [
        plan_trial(checked.config, run_place(checked.config), one.name, one.values)
        for one in known.values()
        if one.outcome not in ("diverged", "failed")
    ]
    compared: set[str] = set()
    for one in planned:
        text = text_key(one.config)
        if one.name in known and known[one.name].outcome and text in compared:
            continue
        try:
            state = state_of(trial_dir(checked.folder, one.name))
            compared |= {text} if state else set()
            check_data(one.config, texts[text], state)
        except UserError as error:
            problems.setdefault(str(error), one.name)
    if problems:
        raise UserError("\n".join(f"trial {name}: {text}" for text, name in problems.items()))


def _share_texts(folder: Path) -> None:
    """Link the sweep's prepared texts to where a run in the trials' folder looks for them."""
    link = folder / "trials" / "data"
    with storing(link):
        link.parent.mkdir(exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(Path("..") / ".." / "data")
