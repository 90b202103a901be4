"""Which trials a sweep has: their values, their configs and, once they are over, the best of them.

A function of the config and of what trials have measured; running them is the runner's.
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
from gptray.tuning.draws import draw
from gptray.tuning.sweep_record import Trial

# Trials that tune.replicates repeats.
FINALISTS = 3
# Draws that are tried out where the values themselves come later, one after the other.
REHEARSED = 64
_SHOWN_PROBLEMS = 12
# The key of data that leaves text and tokens as they are: it is for batches.
NOISE = "token_replacement"


@dataclass(frozen=True)
class Planned:
    """A trial to run: what is set in it, and the config that comes of it."""

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
    """The trials that the seed decides: with Optuna only the baseline. `folder` is the sweep's.

    drawn: how many samples there were after each earlier round; tune.num_samples is the last.
    known: trials of the record, whose names stay theirs.
    Raises UserError if there is no space, or saying which of its values don't go together.
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
    """Names for trials without repetitions: those of the record, then numbers that are free."""
    yield from (trial.name for trial in known if trial.replicate_of is None)
    yield from map(trial_name, itertools.count(len(known)))


def text_key(config: Config) -> str:
    """Equal for configs of a sweep whose text, split and tokens are the same."""
    return config.data.model_dump_json(exclude={NOISE})


def all_texts(config: Config, folder: str, trials: Sequence[Planned]) -> list[Config]:
    """A config for every text that a trial may need, prepared in the sweep's storage."""
    found = [trial.config for trial in trials]
    if config.tune.search_alg != "random":
        entries = [entry for entry in entries_of(config) if any(map(_is_of_text, entry.paths))]
        points = _combinations(entries)
        found += [plan_trial(config, folder, "text", values).config for values in points]
    own = {"name": config.name, "storage_path": config.storage_path}
    return [override(one, own) for one in {text_key(one): one for one in found}.values()]


def _is_of_text(path: str) -> bool:
    return path.startswith("data.") and path != f"data.{NOISE}"


def _combinations(entries: Sequence[Entry]) -> list[dict[str, object]]:
    """Every combination of options, with and without the entries that have a condition."""
    points: list[dict[str, object]] = [{}]
    for entry in entries:
        options = [dict(zip(entry.paths, option, strict=True)) for option in entry.options]
        options += [{}] if entry.when else []
        points = [point | option for point in points for option in options]
    return points


def _refuse_endless_texts(entries: Sequence[Entry]) -> None:
    """What Optuna may suggest has to be prepared before. Raises ConfigError."""
    problems = [
        f"tune.space: {path}: with tune.search_alg=optuna write choice, because every text is "
        "prepared before the first trial"
        for entry in entries
        for path in entry.paths
        if _is_of_text(path) and not entry.options
    ]
    if problems:
        raise ConfigError(problems)


def plan_trial(config: Config, folder: str, name: str, values: Mapping[str, object]) -> Planned:
    """A trial of a sweep, by its values: a run in the sweep's folder, over the sweep's own split.

    Raises ConfigError where they don't go together.
    """
    tune = {f"tune.{key}": value for key, value in TuneConfig().model_dump().items()}
    seed = config.seed if config.data.seed is None else config.data.seed
    own = {
        "name": name,
        "storage_path": f"{folder}/trials",
        "data.seed": seed,
        "train.resume": "auto",
        # At a rung, the score of this very step decides.
        "train.async_validation": False,
    }
    changed = {**tune, **own, **_rates(config, values), **values}
    return Planned(name, values, override(config, changed))


def trial_name(number: int) -> str:
    """The name of a sweep's n-th trial, from 0."""
    return f"{number:04d}"


def replicates(config: Config, folder: str, trials: Sequence[Trial]) -> list[Planned]:
    """The best trials, each with tune.replicates other seeds, to be run to the end.

    Only those that are not among `trials` already.
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
    """The trials that may win, the lowest validation loss first: bits per byte, at their best.

    A trial that went wrong is none of them, however good it was before.
    """
    sound = [trial for trial in trials if trial.outcome not in ("diverged", "failed")]
    return sorted(
        (trial for trial in sound if trial.best), key=lambda trial: (score(trial), trial.name)
    )


def lossy_ahead(trials: Iterable[Trial], winner: Trial | None) -> list[Trial]:
    """The trials that win, lead or rank above a lossless one with a tokenizer that loses text."""
    order = [trial for trial in ranked(trials) if not trial.replicate_of]
    last = max((place for place, trial in enumerate(order) if not trial.lost), default=0)
    return [
        trial
        for place, trial in enumerate(order)
        if trial.lost and (place <= last or (winner and trial.name == winner.name))
    ]


def loses_text(trial: Trial) -> str:
    """What to say of a trial whose tokenizer loses text."""
    return f"trial {trial.name}'s tokenizer loses {percent(trial.lost)} of the text"


def score(trial: Trial) -> float:
    """Validation loss in bits per byte at its lowest; infinite without an evaluation."""
    return float(trial.best["val_bpb"]) if trial.best else math.inf


def choose_winner(trials: Sequence[Trial]) -> Trial | None:
    """The best trial; where some were repeated, the one of these with the lowest mean.

    A repetition that diverged counts as infinitely bad, one that failed not at all. None if no
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
    """The trials of these values, each config once. Raises ConfigError with all that is wrong."""
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
        return []  # data.split does not cut it
    parts = sorted({trial.config.data.split[1] for trial in trials})
    if not parts or parts[-1] - parts[0] < 1e-9:
        return []
    return [
        "tune.space: data.split: the part for validation must be the same in all trials, or they "
        f"would be validated on different text; there are {', '.join(f'{p:.3g}' for p in parts)}"
    ]


def _rates(config: Config, values: Mapping[str, object]) -> dict[str, object]:
    """The learning rates of a trial that trains an adapter where the config does not, or the other
    way round, unless the space has them."""
    is_adapter = values.get("lora.rank", config.lora.rank) is not None
    if "optim.lr" in values or is_adapter == (config.lora.rank is not None):
        return {}
    factor = LEARNING_RATE_FACTOR if is_adapter else 1 / LEARNING_RATE_FACTOR
    optim = config.optim
    return {"optim.lr": factor * optim.lr, "optim.min_lr": factor * optim.min_lr}


def _as_text(values: Mapping[str, object]) -> str:
    return ", ".join(f"{path}={shown(value)}" for path, value in values.items()) or "no change"
