"""trials.parquet: a typed row for each trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from gptray.tuning.sweep_record import trial_dir
from gptray.tuning.table import write_trials_parquet
from tests.tuning.sweeps import BITS, Made, sweep_config, write_sweep

SPACE: list[dict[str, Any]] = [
    {"path": "model.dropout", "choice": [0, 0.1]},
    {"path": "model.residual", "choice": [True, False]},
    {"path": "optim.schedule", "choice": ["cosine", "step"]},
    {"path": "optim.step_size", "choice": [100, 200], "when": {"optim.schedule": "step"}},
    {"path": "data.split", "choice": ["90:10", "80:10:10"]},
]


def test_each_trial_has_a_row_with_its_settings_and_results(tmp_path: Path) -> None:
    own = Made("0000", {}, [(2.5, 0.1), (2.25, 0.25), (2.75, 0.5)], lost=0.125)
    step = {"model.dropout": 0.1, "model.residual": False, "optim.schedule": "step"}
    other = Made("0001", {**step, "optim.step_size": 200, "data.split": "80:10:10"}, [], "failed")
    other.message = "out of memory"
    again = Made("0002", {"model.dropout": 0, "seed": 7}, [(2.0, 0.0)], None, replicate_of="0000")
    folder = write_sweep(tmp_path, sweep_config(SPACE), [own, other, again])
    (trial_dir(folder, "0000") / "model").mkdir()
    events = [{"event": "start", "time": 5.0, "step": 0}, {"event": "end", "time": 9.5}]
    (trial_dir(folder, "0000") / "events.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in events)
    )
    path = write_trials_parquet(folder)
    assert path == folder / "trials.parquet"
    table = parquet.read_table(path)
    first, second, third = table.to_pylist()
    assert first == {
        "trial": "0000",
        "outcome": "finished",
        "replicate_of": None,
        "model.dropout": 0.0,
        "model.residual": True,
        "optim.schedule": "cosine",
        "optim.step_size": None,
        "data.split": "90:10",
        "seed": None,
        "step": 30,
        "max_steps": 120,
        "best_step": 20,
        "val_loss": pytest.approx(2.25 / BITS),
        "val_ppl": pytest.approx(2.0 ** (2.25 / BITS)),
        "val_bpb": 2.25,
        "train_loss": pytest.approx(2.0 / BITS),
        "gap": pytest.approx(0.25 / BITS),
        "lost": 0.125,
        "seconds": 4.5,
        "message": None,
        "model_dir": str(trial_dir(folder, "0000") / "model"),
    }
    assert (second["outcome"], second["message"]) == ("failed", "out of memory")
    assert (second["optim.step_size"], second["data.split"]) == (200, "80:10:10")
    assert second["val_bpb"] is None and second["best_step"] is None and second["step"] == 0
    assert second["lost"] is None
    assert (third["outcome"], third["replicate_of"], third["seed"]) == (None, "0000", 7)
    types = {name: table.schema.field(name).type for name in first}
    assert types["model.dropout"] == types["gap"] == types["seconds"] == pa.float64()
    assert types["optim.step_size"] == types["best_step"] == types["seed"] == pa.int64()
    assert types["model.residual"] == pa.bool_() and types["message"] == pa.string()


def test_a_sweep_without_trials_has_an_empty_table(tmp_path: Path) -> None:
    table = parquet.read_table(write_trials_parquet(write_sweep(tmp_path, sweep_config(SPACE), [])))
    assert table.num_rows == 0 and "model.dropout" in table.column_names
