"""optuna.log: a sweep as Optuna itself reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from gptray.tuning.optuna_file import write_optuna_file
from gptray.tuning.sweep_record import Record
from tests.tuning.sweeps import Made, sweep_config, write_metrics, write_sweep

SPACE: list[dict[str, Any]] = [
    {"path": "model.dropout", "uniform": [0.05, 0.3]},
    {"path": "optim.lr", "loguniform": [3e-4, 3e-3]},
    {"path": "model.residual", "choice": [True, False]},
    {"path": "optim.schedule", "choice": ["cosine", "step"]},
    {"path": "optim.step_size", "randint": [100, 301], "when": {"optim.schedule": "step"}},
    {"path": "data.split", "choice": ["90:10", "80:10:10"]},
    {"path": "train.patience", "choice": [None, 3]},
    {"paths": ["model.n_layer", "model.n_embd"], "choice": [[2, 128], [4, 256]]},
]
VALUES = {
    "model.dropout": 0.1,
    "optim.lr": 0.001,
    "model.residual": False,
    "optim.schedule": "step",
    "optim.step_size": 120,
    "data.split": "80:10:10",
    "train.patience": None,
    "model.n_layer": 4,
    "model.n_embd": 256,
}
CURVE = [(2.5, 0.1), (2.25, 0.25), (2.75, 0.5)]


def studied(path: Path) -> list[FrozenTrial]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.load_study(study_name=path.parent.name, storage=storage)
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    return study.trials


def test_every_trial_has_its_settings_curve_and_end(tmp_path: Path) -> None:
    made = [
        Made("0000", {}, CURVE),
        Made("0001", VALUES, CURVE[:2], "stopped"),
        Made("0002", VALUES, CURVE, "diverged", "loss nan"),
        Made("0003", VALUES, CURVE, None),
        Made("0004", VALUES, [], None, started=False),
        Made("0005", {**VALUES, "seed": 7}, CURVE, "patience", replicate_of="0001"),
        Made("0006", VALUES, [], "failed", "no room"),
    ]
    folder = write_sweep(tmp_path / "sweep", sweep_config(SPACE), made, winner="0000")
    trials = studied(write_optuna_file(folder))
    assert [trial.state for trial in trials] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.RUNNING,
        TrialState.WAITING,
        TrialState.COMPLETE,
        TrialState.FAIL,
    ]
    own, cut, diverged = trials[:3]
    assert own.values == [2.25] and own.intermediate_values == {10: 2.5, 20: 2.25, 30: 2.75}
    assert own.params["model.dropout"] == 0 and own.params["train.patience"] == 5
    assert "optim.step_size" not in own.params
    assert cut.params == VALUES and cut.values == [2.25]
    assert diverged.values is None and diverged.user_attrs["message"] == "loss nan"
    assert trials[5].user_attrs["replicate_of"] == "0001"
    for trial in trials:
        if trial.state.is_finished():
            trial._validate()  # Optuna's own rules for a trial


def test_lines_are_only_added_while_the_sweep_goes_on(tmp_path: Path) -> None:
    config = sweep_config(SPACE)
    made = [Made("0000", VALUES, CURVE), Made("0001", VALUES, CURVE[:1], None)]
    folder = write_sweep(tmp_path / "sweep", config, made)
    path = write_optuna_file(folder)
    before = path.read_bytes()
    follower = JournalStorage(JournalFileBackend(str(path)))  # as a dashboard that is open
    assert follower.get_n_trials(0) == 2
    record = Record(folder)
    record.write("ended", trial="0001", outcome="failed", step=10, message="no room", passing=True)
    record.write("retried", trial="0001")
    write_optuna_file(folder)
    record.write("started", trial="0001")
    write_metrics(folder, config, Made("0001", VALUES, CURVE))
    record.write("ended", trial="0001", outcome="finished", step=30)
    assert write_optuna_file(folder).read_bytes().startswith(before)
    states = [trial.state for trial in follower.get_all_trials(0)]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert follower.get_all_trials(0)[1].intermediate_values == {10: 2.5}


def test_a_trial_that_waits_at_a_rung_is_pruned_when_the_sweep_is_over(tmp_path: Path) -> None:
    made = [Made(f"{n:04d}", VALUES, CURVE[:1], "stopped") for n in range(2)]
    folder = write_sweep(tmp_path / "sweep", config := sweep_config(SPACE), made)
    path = write_optuna_file(folder)
    before = path.read_bytes()
    assert [trial.state for trial in studied(path)] == [TrialState.RUNNING] * 2
    record = Record(folder)
    record.write("promoted", trial="0000")
    record.write("started", trial="0000")
    write_metrics(folder, config, Made("0000", VALUES, CURVE))
    record.write("ended", trial="0000", outcome="finished", step=30)
    record.write("winner", trial="0000")
    assert write_optuna_file(folder).read_bytes().startswith(before)
    assert [trial.state for trial in studied(path)] == [TrialState.COMPLETE, TrialState.PRUNED]
    record.write("reopened")  # more samples, and what was pruned is promoted
    record.write("promoted", trial="0001")
    assert write_optuna_file(folder).read_bytes().startswith(before)
    assert [trial.state for trial in studied(path)][2:] == [TrialState.WAITING]


def test_a_file_that_is_something_else_is_written_anew(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", sweep_config(SPACE), [Made("0000", VALUES, CURVE)])
    (folder / "optuna.log").write_text("{torn")
    assert [trial.values for trial in studied(write_optuna_file(folder))] == [[2.25]]


def test_optuna_goes_on_from_the_file(tmp_path: Path) -> None:
    made = [Made(f"{n:04d}", {**VALUES, "model.dropout": n / 20}, CURVE) for n in range(1, 6)]
    path = write_optuna_file(write_sweep(tmp_path / "sweep", sweep_config(SPACE), made))
    study = optuna.load_study(
        study_name="sweep",
        storage=JournalStorage(JournalFileBackend(str(path))),
        sampler=optuna.samplers.TPESampler(n_startup_trials=1, seed=1),
    )
    trial = study.ask(study.best_trial.distributions)
    assert 0 <= trial.params["model.dropout"] <= 0.3
    study.tell(trial, 2.0)
    assert study.best_value == pytest.approx(2.0)
