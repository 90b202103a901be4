"""Hand-made runs: rows of metrics.jsonl and events whose story is known."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptray.config import Config, dump, load_config
from gptray.storage.record import Event, MetricsRow

Rows = list[MetricsRow]


def rows_of(val: Sequence[float], train: Sequence[float] | None = None, every: int = 10) -> Rows:
    """A row for each evaluation; training loss falls from 6 to 1 where it is not given."""
    train = train or [1 + 5 * math.exp(-i / max(1, len(val) - 1) * 3) for i in range(len(val))]
    return [
        {
            "step": every * (number + 1),
            "epoch": 0.5 * (number + 1),
            "train_loss": train[number],
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_sec": 2048.0,
            "val_loss": loss,
            "val_ppl": math.exp(loss),
            "val_bpb": loss / 3,
            "gap": loss - train[number],
        }
        for number, loss in enumerate(val)
    ]


def config_of(rows: Rows, *overrides: str) -> Config:
    """A run that was to end at its last row, without early stopping: 2,048 tokens a step."""
    values = {
        "train.max_steps": str(rows[-1]["step"] if rows else 100),
        "train.eval_interval": "10",
        "train.patience": "null",
        "model.dropout": "0.2",
        "optim.warmup_steps": "5",
    }
    values |= dict(pair.split("=", 1) for pair in overrides)
    return load_config(None, [f"{key}={value}" for key, value in values.items()])


def started(step: int = 0, *, time: float = 0.0, parameters: int = 1_000_000) -> Event:
    return {
        "event": "start",
        "time": time,
        "step": step,
        "workers": 2,
        "dtype": "float32",
        "parameters": parameters,
        "pid": 1,
        "device": "a slow processor",
        "versions": {"torch": "2.99"},
    }


def evaluated(step: int, samples: list[list[str]], *, time: float = 0.0) -> Event:
    return {"event": "evaluated", "time": time, "step": step, "best": False, "samples": samples}


def write_run(folder: Path, rows: Rows, events: Sequence[Event], config: Config) -> Path:
    """A run folder as the training job leaves it, as far as a report reads it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(dump(config))
    files: dict[str, Sequence[Mapping[str, object]]] = {"metrics": rows, "events": events}
    for name, lines in files.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return folder
