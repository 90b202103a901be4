"""Plans a sweep's trials: their values, their configs and, once they are over, the winner.

Pure functions of the config and of the trials' measurements; the tune job runs the trials.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gptray.config import Config, ConfigError, TuneConfig, UserError, flatten, override
from gptray.config.keys import shown
from gptray.config.lora_section import LEARNING_RATE_FACTOR
from gptray.config.search_space import Entry, read_space
from gptray.data.difference import percent
from gptray.tuning.draws import draw, few
from gptray.tuning.sweep_record import Trial

# How many of the best trials tune.replicates repeats.
FINALISTS = 3
# With Optuna, values come one by one later, so this many random draws are checked in advance.
REHEARSED = 64
_SHOWN_PROBLEMS = 12
# The one key of data that does not change text and tokens: it affects batches.
NOISE = "token_replacement"


@dataclass(frozen=True)
class Planned:
    """A trial to run: its values and the resulting config."""

    name: str
    values: Mapping[str, object]
    config: Config
    replicate_of: str | None = None


def entries_of(config: Config) -> list[Entry]:
    """The search space of a sweep's config."""
    return read_space(config.tune.space, Config)


def plan_trials(
    config: Config, folder: str, *, drawn: Sequence[int] = (), known: Sequence[Trial] = ()
) -> list[Planned]:
    """The trials that the seed determines: with Optuna, only the baseline. `folder` is the sweep's.

    drawn: how many samples there were after each earlier round; tune.num_samples is the last.
    known: recorded trials, which keep their names.
    Raises UserError if there is no space or if some of its values contradict each other.
    """
    entries = entries_of(config)
    if not entries:
        raise UserError(
            "tune.space is empty: list what the trials differ in, such as "
            "tune.space='[{path: model.dropout, uniform: [0, 0.3]}]'; see "
            "configs/overfitting_sweep.yaml"
        )
    is_known = config.tune.search_alg == "random"
    if not is_known:
        _refuse_endless_texts(entries)
    values: list[dict[str, object]] = [{}] if config.tune.baseline else []
    baseline = len(values)
    before = 0
    for number in sorted({*drawn, config.tune.num_samples} if is_known else {REHEARSED}):
        values += draw(entries, number - before, seed=config.seed, after=before)
        before = number
    trials = _checked(values, config, folder, _names(known))
    return trials if is_known else trials[:baseline]


def _names(known: Sequence[Trial]) -> Iterator[str]:
    """Names for trials, without repetitions: the recorded ones, then unused numbers."""
    yield from (trial.name for trial in known if trial.replicate_of is None)
    yield from map(trial_name, itertools.count(len(known)))


def text_key(config: Config) -> str:
    """A key that is equal for configs whose text, split and tokens are the same."""
    return config.data.model_dump_json(exclude={NOISE})


def all_texts(config: Config, folder: str, trials: Sequence[Planned]) -> list[Config]:
    """A config to prepare each text that a trial may need, in the sweep's storage."""
    found = [trial.config for trial in trials]
    if config.tune.search_alg != "random":
        entries = [entry for entry in entries_of(config) if any(map(_changes_text, entry.paths))]
        points = _combinations(entries)
        found += [plan_trial(config, folder, "text", values).config for values in points]
    own = {"name": config.name, "storage_path": config.storage_path}
    return [override(one, own) for one in {text_key(one): one for one in found}.values()]


def _changes_text(path: str) -> bool:
    return path.startswith("data.") and path != f"data.{NOISE}"


def _combinations(entries: Sequence[Entry]) -> list[dict[str, object]]:
    """Every combination of options, with and without entries that have a condition."""
    points: list[dict[str, object]] = [{}]
    for entry in entries:
        options = [dict(zip(entry.paths, option, strict=True)) for option in entry.options]
        options += [{}] if entry.when else []
        points = few(point | option for point in points for option in options)
    return points


def _refuse_endless_texts(entries: Sequence[Entry]) -> None:
    """Raise ConfigError if Optuna could suggest texts that cannot all be prepared in advance."""
    problems = [
        f"tune.space: {path}: with tune.search_alg=optuna write choice, because every text is "
        "prepared before the first trial"
        for entry in entries
        for path in entry.paths
        if _changes_text(path) and not entry.options
    ]
    if problems:
        raise ConfigError(problems)


def plan_trial(config: Config, folder: str, name: str, values: Mapping[str, object]) -> Planned:
    """The trial with these values: a run in the sweep's folder, over the sweep's own split.

    Raises ConfigError if the values contradict each other.
    """
    tune = {f"tune.{key}": value for key, value in TuneConfig().model_dump().items()}
    seed = config.seed if config.data.seed is None else config.data.seed
    own = {
        "name": name,
        "storage_path": f"{folder}/trials",
        "data.seed": seed,
        "train.resume": "auto",
        # A rung decides by the score of that very step.
        "train.async_validation": False,
    }
    changed = {**tune, **own, **_rates(config, values), **values}
    return Planned(name, values, override(config, changed))


def trial_name(number: int) -> str:
    """The name of a sweep's n-th trial, from 0."""
    return f"{number:04d}"


def replicates(config: Config, folder: str, trials: Sequence[Trial]) -> list[Planned]:
    """Repetitions of the best trials, each with tune.replicates other seeds, to run to the end.

    Only those that are not among `trials` yet.
    """
    primary = [trial for trial in trials if trial.replicate_of is None]
    there = {(trial.replicate_of, trial.values.get("seed")) for trial in trials}
    planned: list[Planned] = []
    for trial in ranked(primary)[: FINALISTS if config.tune.replicates else 0]:
        seed = trial.values.get("seed", config.seed)
        assert isinstance(seed, int)
        for extra in range(1, config.tune.replicates + 1):
            values = {**trial.values, "seed": (seed + extra) % 2**32}
            if (trial.name, values["seed"]) in there:
                continue
            name = trial_name(len(trials) + len(planned))
            one = plan_trial(config, folder, name, values)
            planned.append(Planned(name, values, one.config, trial.name))
    return planned


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """The trials that may win, ordered by their lowest validation loss in bits per byte.

    A trial that went wrong is left out, however good it was before.
    """
    sound = [trial for trial in trials if trial.outcome not in ("diverged", "failed")]
    return sorted(
        (trial for trial in sound if trial.best), key=lambda trial: (score(trial), trial.name)
    )


def lossy_ahead(trials: Iterable[Trial], winner: Trial | None) -> list[Trial]:
    """Trials whose tokenizer loses text and that win, lead or rank above a lossless trial."""
    order = [trial for trial in ranked(trials) if not trial.replicate_of]
    last = max((place for place, trial in enumerate(order) if not trial.lost), default=0)
    return [
        trial
        for place, trial in enumerate(order)
        if trial.lost and (place <= last or (winner and trial.name == winner.name))
    ]


def loses_text(trial: Trial) -> str:
    """A note on a trial whose tokenizer loses text."""
    return f"trial {trial.name}'s tokenizer loses {percent(trial.lost)} of the text"


def score(trial: Trial) -> float:
    """The lowest validation loss in bits per byte; infinite without an evaluation."""
    return float(trial.best["val_bpb"]) if trial.best else math.inf


def choose_winner(trials: Sequence[Trial]) -> Trial | None:
    """The best trial or, if some were repeated, the repeated one with the lowest mean score.

    A repetition that diverged counts as infinitely bad; one that failed does not count. None if no
    trial may win.
    """
    best = ranked(trial for trial in trials if trial.replicate_of is None)
    repeated = [trial for trial in best if any(one.replicate_of == trial.name for one in trials)]
    return min(repeated or best, key=lambda trial: mean_score(trial, trials), default=None)


def mean_score(trial: Trial, trials: Sequence[Trial]) -> float:
    """The mean score of a trial and its repetitions."""
    repetitions = [one for one in trials if one.replicate_of == trial.name]
    scores = [score(one) for one in repetitions if one.outcome not in ("diverged", "failed")]
    scores += [math.inf for one in repetitions if one.outcome == "diverged"]
    return math.fsum([score(trial), *scores]) / (1 + len(scores))


def _checked(
    drawn: Sequence[Mapping[str, object]], config: Config, folder: str, names: Iterator[str]
) -> list[Planned]:
    """The trials with these values, each config once. Raises ConfigError with all problems."""
    found: dict[str, Planned] = {}
    problems: dict[str, str] = {}
    name = next(names)
    for values in drawn:
        try:
            trial = plan_trial(config, folder, name, values)
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, _as_text(values))
            continue
        keys = {**flatten(trial.config), "name": None}
        key = json.dumps(keys, sort_keys=True, default=list)
        if key not in found:
            found[key] = trial
            name = next(names)
    lines = [
        f"tune.space: {problem} (in a trial with {text})" for problem, text in problems.items()
    ]
    lines += _unequal_validation(list(found.values()))
    if len(lines) > _SHOWN_PROBLEMS:
        lines[_SHOWN_PROBLEMS:] = [f"... and {len(lines) - _SHOWN_PROBLEMS} more such trials"]
    if lines:
        raise ConfigError(lines)
    return list(found.values())


def _unequal_validation(trials: Sequence[Planned]) -> list[str]:
    sources = {str(trial.config.data.val_source) for trial in trials}
    if len(sources) > 1:
        return [
            "tune.space: data.val_source: validation text must be the same in all trials; there "
            f"are {', '.join(sorted(sources))}"
        ]
    if sources != {str(None)}:
        return []  # validation text has its own source, whatever data.split says
    parts = sorted({trial.config.data.split[1] for trial in trials})
    if not parts or parts[-1] - parts[0] < 1e-9:
        return []
    return [
        "tune.space: data.split: the part for validation must be the same in all trials, or they "
        f"would be validated on different text; there are {', '.join(f'{p:.3g}' for p in parts)}"
    ]


def _rates(config: Config, values: Mapping[str, object]) -> dict[str, object]:
    """Scaled learning rates if a trial trains an adapter but the config does not, or vice versa.

    Empty if the space sets the learning rate.
    """
    is_adapter = values.get("lora.rank", config.lora.rank) is not None
    if "optim.lr" in values or is_adapter == (config.lora.rank is not None):
        return {}
    factor = LEARNING_RATE_FACTOR if is_adapter else 1 / LEARNING_RATE_FACTOR
    rates = {"optim.lr": config.optim.lr, "optim.min_lr": config.optim.min_lr}
    # Rounded, so that a tenth of 0.017 is 0.0017.
    return {key: float(f"{factor * rate:.12g}") for key, rate in rates.items() if rate}


def _as_text(values: Mapping[str, object]) -> str:
    return ", ".join(f"{path}={shown(value)}" for path, value in values.items()) or "no change"
