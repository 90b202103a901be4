"""Checks a sweep before it starts: plans its trials, and makes the rows of its --dry-run.

Imports neither torch nor Ray: every mistake is reported before anything expensive starts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gptray.config import Config, UserError, load_config, override
from gptray.config.keys import shown
from gptray.config.search_space import Entry
from gptray.data.request import make_request
from gptray.data.tokens import TokenData
from gptray.jobs.base import Plan
from gptray.jobs.cluster.machine import check_training
from gptray.jobs.folders.remote_run import download_run
from gptray.jobs.folders.resuming import check_free, check_resumable, command
from gptray.jobs.folders.run_folder import resolve, run_dir, run_place
from gptray.jobs.models import CONFIG
from gptray.jobs.prepare.check import CheckedText, check_text
from gptray.jobs.prepare.other_texts import OtherTexts, check_also
from gptray.jobs.progress.trackers import check_trackers
from gptray.jobs.train.check import check_data, check_prompts
from gptray.jobs.train.given_models import check_base, check_teachers, check_vocabulary
from gptray.tuning.more_trials import ENOUGH, MORE, StoppedEarly, judges
from gptray.tuning.sweep_record import load_trials, rungs, samples_drawn
from gptray.tuning.trial_plan import (
    FINALISTS,
    Planned,
    all_texts,
    entries_of,
    plan_trials,
    text_key,
)
from gptray.wording import count

BUSY = "another process runs the sweep {}"
FILES = "config.yaml trials.jsonl trials/ best.yaml model/ trials.parquet optuna.log report.html"


@dataclass(frozen=True)
class CheckedSweep:
    """A sweep that can start. `trials`: those known so far.

    texts: the trials' training texts, by `text_key`. also: the texts of evaluate.also.
    changes: a sentence for each key that changes in an existing sweep.
    """

    config: Config
    folder: Path
    trials: Sequence[Planned]
    texts: Mapping[str, CheckedText]
    changes: Sequence[str] = ()
    also: OtherTexts = field(default_factory=dict)

    @property
    def num_trials(self) -> int:
        """The number of trials without repetitions."""
        if self.config.tune.search_alg == "random":
            return len(self.trials)
        return self.config.tune.num_samples + len(self.trials)

    @property
    def num_replicates(self) -> int:
        """The most repetitions."""
        return min(FINALISTS, self.num_trials) * self.config.tune.replicates


def check(config: Config) -> CheckedSweep:
    """Resolve the config and find every mistake that can be found without torch and Ray.

    Raises UserError with all problems of the space, the text, the machine and the folder.
    """
    config = resolve(config, sweep=True)
    if config.tune.search_alg == "optuna" and importlib.util.find_spec("optuna") is None:
        raise UserError(
            "tune.search_alg=optuna needs the package optuna: pip install 'gptray[optuna]'"
        )
    folder, place = run_dir(config), run_place(config)
    download_run(config, busy=BUSY.format(place))
    changes = check_resumable(config, sweep=True)
    check_free(folder, busy=BUSY.format(place))
    drawn, known = samples_drawn(folder), load_trials(folder)
    if changes and not drawn:
        drawn = [load_config(str(folder / CONFIG), []).tune.num_samples]
    trials = plan_trials(config, place, drawn=drawn, known=known)
    if any(one.train.async_validation for one in [config, *(trial.config for trial in trials)]):
        raise UserError(
            "train.async_validation=true is for single runs: a sweep compares and stops trials "
            "by scores that must not come late; leave it out"
        )
    if config.compute.is_elastic:
        raise UserError(
            f"compute.num_workers={config.compute.workers_shown}: the trials of a sweep have a "
            f"fixed number of workers, such as {config.compute.min_workers}"
        )
    check_training(config)
    check_trackers(config.track)
    check_teachers(config, folder)
    texts = {text_key(one): check_text(one) for one in all_texts(config, place, trials)}
    for one in [config, *(trial.config for trial in trials)]:
        check_vocabulary(one)
        check_base(one, None)
        if one.sample.prompt or one.sample.stop_token_ids:
            check_prompts(one, CheckedText(one, make_request(one)).tokenizer)
    also = check_also(config, config, trained_on=make_request(config))
    _check_prepared(trials, texts)
    return CheckedSweep(config, folder, trials, texts, changes, also)


def how_to_extend(checked: CheckedSweep) -> str:
    """A hint for a finished sweep: how to run more trials, if its space has more."""
    config, folder = checked.config, checked.folder
    another = "for a new one, set train.resume=never and another name"
    if stopped := StoppedEarly.of_sweep(folder):
        whole = command("tune", config, folder, "tune.min_gain=0")
        return (
            f"this sweep is finished: it stopped itself after {stopped.trials} of {stopped.of} "
            f"trials; to run the others: {whole}; {another}"
        )
    number = 2 * config.tune.num_samples
    drawn = samples_drawn(folder) or [config.tune.num_samples]
    try:
        more = override(config, {"tune.num_samples": number})
        trials = plan_trials(more, run_place(config), drawn=drawn, known=load_trials(folder))
    except UserError:  # too many trials for one sweep
        return f"this sweep is finished; {another}"
    if config.tune.search_alg == "random" and len(trials) == len(checked.trials):
        return f"this sweep is finished and has tried its whole space; {another}"
    longer = command("tune", config, folder, f"tune.num_samples={number}")
    return f"this sweep is finished; for more trials: {longer}; {another}"


def _check_prepared(trials: Sequence[Planned], texts: Mapping[str, CheckedText]) -> None:
    """Check prepared texts as the job does once all are prepared. Raises UserError."""
    check_same_validation(text.data for text in texts.values() if text.data)
    problems: dict[str, str] = {}
    for trial in trials:
        text = texts.get(text_key(trial.config))
        if text and text.data:
            try:
                check_data(trial.config, text.data, None)
            except UserError as error:
                problems.setdefault(str(error), trial.name)
    if problems:
        raise UserError("\n".join(f"trial {name}: {why}" for why, name in problems.items()))


def check_same_validation(texts: Iterable[TokenData]) -> None:
    """Raise UserError if the texts' validation splits differ."""
    sizes = {(text.val.documents, text.val.bytes) for text in texts}
    if len(sizes) > 1:
        found = ", ".join(
            f"{count(number, 'document')} of {size:,} bytes" for number, size in sorted(sizes)
        )
        raise UserError(
            f"tune.space: trials would be validated on different text ({found}); give all of them "
            "the same data.source and share for validation, or one data.val_source"
        )


def plan(checked: CheckedSweep) -> Plan:
    """What the job would do."""
    config = checked.config
    known = [one.config.train.max_steps for one in checked.trials]
    most = max(known, default=config.train.max_steps)
    others = checked.num_trials - len(known) + checked.num_replicates
    ready = [text.data for text in checked.texts.values() if text.data]
    ended = [one for one in load_trials(checked.folder) if one.has_ended]
    rows = [("sweep", run_place(config))]
    rows += [
        (f"varies {number}", _line(entry)) for number, entry in enumerate(entries_of(config), 1)
    ]
    rows += [
        ("trials", _trials(checked)),
        ("at a time", _at_once(config)),
        ("rungs", _rungs(config)),
        ("steps", f"{sum(known) + others * most:,} at most, if no trial stops early"),
        ("texts to train on", f"{len(checked.texts)}, {len(ready)} of them ready"),
        *(("lost", f"{data.loses} ({data.data_dir})") for data in ready if data.loses),
    ]
    if judges(config) and sum(bool(one.values) for one in checked.trials) > ENOUGH:
        little = f"{shown(config.tune.min_gain)} bits per byte (95%)"
        when = f"once {MORE} more trials would improve the best by less than {little}"
        rows.append(("may stop", when))
    if checked.also:
        rows.append(("scored too", ", ".join(checked.also)))
    if checked.changes:
        rows.append(("changes", "; ".join(checked.changes)))
    if ended:
        rows.append(("ended already", count(len(ended), "trial")))
    rows.append(("files", FILES))
    return rows


def _line(entry: Entry) -> str:
    """An entry of the space in words."""
    if entry.options:
        options = [option[0] if len(entry.paths) == 1 else option for option in entry.options]
        values = ", ".join(shown(option) for option in options)
    else:
        high = entry.high - 1 if entry.kind == "randint" else entry.high
        values = f"{shown(entry.low)} to {shown(high)}"
    text = f"{', '.join(entry.paths)}: {entry.kind} {values}"
    when = " and ".join(
        f"{path} is {' or '.join(map(shown, any_of))}" for path, any_of in entry.when.items()
    )
    return f"{text}, when {when}" if when else text


def _trials(checked: CheckedSweep) -> str:
    tune = checked.config.tune
    parts = ["the config as it is"] if tune.baseline else []
    drawn = checked.num_trials - len(parts)
    parts.append(
        f"{drawn:,} suggested by Optuna" if tune.search_alg == "optuna" else f"{drawn:,} drawn"
    )
    if checked.num_replicates:
        parts.append(f"{checked.num_replicates} repetitions of the best at most")
    in_all = checked.num_trials + checked.num_replicates
    return f"{in_all:,}: {', '.join(parts)}" if len(parts) > 1 else parts[0]


def _at_once(config: Config) -> str:
    most = config.tune.max_concurrent_trials
    workers = config.compute.max_workers
    number = f"{most} at most" if most else "as many as fit"
    return f"{number}, {workers} worker{'s' if workers > 1 else ''} each"


def _rungs(config: Config) -> str:
    steps = rungs(config)
    if not steps:
        return "none, every trial runs to its end"
    keep = config.tune.reduction_factor
    at = f"step{'s' if len(steps) > 1 else ''} {', '.join(f'{step:,}' for step in steps)}"
    return f"at {at}: the best 1 in {keep} continues"
