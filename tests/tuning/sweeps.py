"""Hand-made sweeps: trials with known curves, cut as ASHA would, as a sweep leaves its folder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptray.config import Config, dump, load_config
from gptray.config.search_space import read_space
from gptray.storage.record import METRICS
from gptray.tuning.draws import draw
from gptray.tuning.sweep_record import Record, rungs, trial_dir

Values = Mapping[str, Any]
# Bits per byte of one token's nat, in these sweeps.
BITS = 0.4
EVERY, STEPS = 10, 120


def sweep_config(space: Sequence[Mapping[str, Any]], *overrides: str) -> Config:
    """Rungs at 20 and 60 of 120 steps."""
    values = {
        "train.max_steps": str(STEPS),
        "train.eval_interval": str(EVERY),
        "tune.grace_period": "2",
        "tune.space": json.dumps(list(space)),
    }
    values |= dict(pair.split("=", 1) for pair in overrides)
    return load_config(None, [f"{key}={value}" for key, value in values.items()])


@dataclass
class Made:
    """A trial to be written: its curve of (bits per byte, gap in bits per byte) by evaluation.

    lost: the share of the text that its tokenizer loses.
    """

    name: str
    values: Values
    curve: list[tuple[float, float]]
    outcome: str | None = "finished"
    message: str | None = None
    replicate_of: str | None = None
    started: bool = True
    lost: float = 0.0


def trained(
    config: Config,
    worth: Callable[[Values], tuple[float, float]],
    *,
    seed: int = 0,
    noise: float = 0.01,
    late: Callable[[Values], float] = lambda values: 0.0,
) -> list[Made]:
    """The trials of a config, run to their ends: each falls towards 2 plus what it is worth.

    worth: of its values, for loss and gap. late: what is added in the second half.
    """
    rng = random.Random(seed)
    drawn = draw(read_space(config.tune.space, Config), config.tune.num_samples, seed=seed)
    found = []
    for number, values in enumerate(drawn):
        loss, gap = worth(values)
        own, own_gap = rng.gauss(0, noise), rng.gauss(0, noise)
        curve = []
        every = config.train.eval_interval
        for step in range(every, config.train.max_steps + 1, every):
            part = step / config.train.max_steps
            level = 2.0 + loss + own + 1.5 * 0.5 ** (10 * part) + rng.gauss(0, noise / 4)
            level += late(values) * max(0.0, 2 * part - 1)
            curve.append((level, (0.2 + gap + own_gap) * part))
        found.append(Made(f"{number:04d}", values, curve))
    return found


def cut(config: Config, trials: Sequence[Made]) -> list[Made]:
    """What ASHA leaves of finished trials that come one after the other."""
    keep, every = config.tune.reduction_factor, config.train.eval_interval
    seen: dict[int, list[float]] = {step: [] for step in rungs(config)}
    for trial in trials:
        for step, before in seen.items():
            number = step // every
            if trial.outcome != "finished" or len(trial.curve) < number:
                continue
            mine = trial.curve[number - 1][0]
            before.append(mine)
            if sum(other < mine for other in before) >= max(1, len(before) / keep):
                trial.curve, trial.outcome = trial.curve[:number], "stopped"
    return list(trials)


def write_sweep(
    folder: Path, config: Config, trials: Sequence[Made], *, winner: str | None = None
) -> Path:
    """The sweep's folder with its record and its trials' metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config))
    record = Record(folder)
    for trial in trials:
        record.write(
            "planned",
            trial=trial.name,
            values=trial.values,
            max_steps=trial.values.get("train.max_steps", config.train.max_steps),
            replicate_of=trial.replicate_of,
        )
    for trial in trials:
        if trial.started:
            record.write("started", trial=trial.name)
            write_metrics(folder, config, trial)
        if trial.outcome:
            step = len(trial.curve) * config.train.eval_interval
            record.write(
                "ended", trial=trial.name, outcome=trial.outcome, step=step, message=trial.message
            )
    if winner:
        record.write("winner", trial=winner)
    return folder


def write_metrics(folder: Path, config: Config, trial: Made) -> None:
    """The trial's metrics.jsonl: a row for each evaluation."""
    run = trial_dir(folder, trial.name)
    run.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "step": number * config.train.eval_interval,
            "epoch": 0.1 * number,
            "train_loss": (bits - gap) / BITS,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_sec": 2048.0,
            "val_loss": bits / BITS,
            "val_ppl": 2.0 ** (bits / BITS),
            "val_bpb": bits,
            "gap": gap / BITS,
            **({"val_lost": trial.lost} if trial.lost else {}),
        }
        for number, (bits, gap) in enumerate(trial.curve, start=1)
    ]
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
