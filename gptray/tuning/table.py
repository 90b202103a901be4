"""`trials.parquet`: a sweep's trials as a table, for notebooks and spreadsheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from gptray.config import Config
from gptray.config.keys import field_specs
from gptray.data.parts import write_whole
from gptray.storage.record import read_events, seconds_trained
from gptray.tuning.levels import Space, value_text
from gptray.tuning.sweep_record import Sweep, load_sweep, trial_dir

TABLE = "trials.parquet"
# Metrics of the evaluation with the lowest loss, as in metrics.jsonl.
BEST = ("val_loss", "val_ppl", "val_bpb", "train_loss", "gap")


def write_trials_parquet(folder: Path) -> Path:
    """Write a sweep's `trials.parquet` atomically; return its path.

    One row per trial: trial, outcome (null: waits or runs), replicate_of; a column of the key's
    type for each path that any trial sets, null if this trial does not, with lists as text; step,
    max_steps; best_step and the metrics of the evaluation with the lowest loss, `gap` in nats per
    token; lost, the share of the validation text that the tokenizer loses; seconds of training
    without pauses; message; model_dir.
    """
    sweep = load_sweep(folder)
    space, specs = Space(sweep.config), field_specs(Config)
    settings = [space.settings(trial) for trial in sweep.trials]
    paths = dict.fromkeys([*space.paths, *(key for one in settings for key in one)])
    columns: dict[str, pa.Array] = {
        "trial": pa.array([trial.name for trial in sweep.trials], pa.string()),
        "outcome": pa.array([trial.outcome for trial in sweep.trials], pa.string()),
        "replicate_of": pa.array([trial.replicate_of for trial in sweep.trials], pa.string()),
    }
    for key in paths:
        columns[key] = _column([one.get(key) for one in settings], specs[key].kinds)
    columns |= _results(sweep)
    path = folder / TABLE
    write_whole(pa.table(columns), path)
    return path


def _column(values: Sequence[object], kinds: Sequence[type]) -> pa.Array:
    types = {float: pa.float64(), int: pa.int64(), bool: pa.bool_()}
    kinds = () if str in kinds else kinds
    kind = next((types[kind] for kind in types if kind in kinds), pa.string())
    if kind == pa.string():
        values = [None if value is None else value_text(value) for value in values]
    return pa.array(values, kind)


def _results(sweep: Sweep) -> dict[str, pa.Array]:
    trials = sweep.trials
    best: list[Mapping[str, object]] = [trial.best or {} for trial in trials]
    folders = [trial_dir(sweep.folder, trial.name) for trial in trials]
    seconds = [seconds_trained(read_events(folder)) or None for folder in folders]
    models = [folder / "model" for folder in folders]
    return {
        "step": pa.array([trial.step for trial in trials], pa.int64()),
        "max_steps": pa.array([trial.max_steps for trial in trials], pa.int64()),
        "best_step": pa.array([row.get("step") for row in best], pa.int64()),
        **{key: pa.array([row.get(key) for row in best], pa.float64()) for key in BEST},
        "lost": pa.array([trial.lost if trial.best else None for trial in trials], pa.float64()),
        "seconds": pa.array(seconds, pa.float64()),
        "message": pa.array([trial.message for trial in trials], pa.string()),
        "model_dir": pa.array(
            [str(model) if model.is_dir() else None for model in models], pa.string()
        ),
    }
