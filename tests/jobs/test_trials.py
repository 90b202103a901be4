"""What Tune is told at a rung, and Optuna of trials; how a machine is shared out among them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptray.config import Config, dump, load_config, override
from gptray.jobs.cluster.resources import trial_resources
from gptray.jobs.folders.run_folder import resolve
from gptray.jobs.train.task import TrainTask, TrialTask
from gptray.jobs.tune.check import check
from gptray.jobs.tune.check import plan as sweep_plan
from gptray.jobs.tune.suggestions import Suggestions
from gptray.jobs.tune.trials import Rungs
from gptray.jobs.tune.worker import run_trial
from gptray.storage.record import METRICS
from gptray.tuning.halving import Halving
from gptray.tuning.sweep_record import Record, load_trials, trial_dir

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def suggesting(tmp_path: Path) -> Config:
    space = [
        {"path": "model.n_head", "choice": [4, 6]},
        {"path": "optim.schedule", "choice": ["step", "cosine"]},
        {"path": "optim.step_size", "randint": [5, 9], "when": {"optim.schedule": "step"}},
    ]
    keys = {"name": "a", "tune.space": space, "tune.search_alg": "optuna"}
    config = override(Config(), {**keys, "storage_path": str(tmp_path.parent)})
    (tmp_path / "config.yaml").write_text(dump(config))
    return config


def finish(
    folder: Path, name: str, suggestions: Suggestions, record: Record, *losses: float
) -> None:
    """End a trial that was evaluated at each tenth step."""
    run, losses = trial_dir(folder, name), losses or (2.0,)
    run.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": 10 * place, "train_loss": 1.0, "val_bpb": loss}
        for place, loss in enumerate(losses, start=1)
    ]
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    record.write(
        "ended",
        trial=name,
        outcome="finished" if len(losses) > 1 else "stopped",
        step=10 * len(rows),
    )
    suggestions.over(name)


def test_optuna_suggests_what_goes_together_and_learns_on(
    suggesting: Config, tmp_path: Path
) -> None:
    record = Record(tmp_path)
    suggestions = Suggestions(suggesting, tmp_path, record, num_trials=10)
    planned = [one for one in (suggestions.suggest() for _ in range(3)) if one]
    for plan in planned:
        finish(tmp_path, plan.name, suggestions, record)
    before = [(one.values, one.point) for one in load_trials(tmp_path)]
    record = Record(tmp_path)
    suggestions = Suggestions(suggesting, tmp_path, record, num_trials=10)
    while following := suggestions.suggest():
        planned.append(following)
        finish(tmp_path, following.name, suggestions, record)
    trials = load_trials(tmp_path)
    assert (
        len(trials) == 10 and [(one.values, one.point) for one in trials][: len(before)] == before
    )
    # A width of 256 has no 6 heads: such a trial failed before it began.
    failed = [one for one in trials if one.outcome == "failed"]
    assert failed and all(one.values["model.n_head"] == 6 for one in failed)
    assert all("divisible" in (one.message or "") for one in failed)
    assert len(planned) + len(failed) == 10
    for one in trials:
        assert ("optim.step_size" in one.values) == (one.values["optim.schedule"] == "step")
        assert one.values.get("optim.step_size", 5) in range(5, 9)
    assert len({json.dumps(one.point) for one in trials}) == 10
    # A repetition is none of the ten, and has a name of its own.
    record.write("planned", trial="0010", values={"seed": 2}, max_steps=60, replicate_of="0000")
    suggestions = Suggestions(suggesting, tmp_path, record, num_trials=11)
    suggestions.suggest()
    assert [one.name for one in load_trials(tmp_path)][-2:] == ["0010", "0011"]


def test_optuna_knows_one_value_of_a_trial_that_has_gone_on(tmp_path: Path) -> None:
    folder, copy = tmp_path / "a", tmp_path / "copy"
    space = [{"path": "optim.lr", "loguniform": [1e-4, 1e-1]}]
    keys = {"name": "a", "tune.space": space, "tune.search_alg": "optuna"}
    config = override(Config(), {**keys, "storage_path": str(tmp_path)})
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(config))
    record = Record(folder)
    suggestions = Suggestions(config, folder, record, num_trials=30)
    planned = [one for one in (suggestions.suggest() for _ in range(14)) if one]
    losses = {one.name: 2 + abs(math.log10(one.config.optim.lr) + 2.5) for one in planned[:-1]}
    for name, loss in losses.items():  # the last one runs
        finish(folder, name, suggestions, record, loss)
    for name in ("0000", "0005"):
        record.write("promoted", trial=name)
        finish(folder, name, suggestions, record, losses[name], 1.5)
    shutil.copytree(folder, copy)
    after_kill = Suggestions(config, copy, Record(copy), num_trials=30)
    assert suggestions.suggest() and after_kill.suggest()
    assert load_trials(folder)[-1].point == load_trials(copy)[-1].point
    finish(copy, "0013", after_kill, Record(copy), 2.5)


@pytest.mark.parametrize(
    ("keys", "trials", "at_once", "expected"),
    [
        ({}, 16, None, (2, 1.0)),
        ({}, 1, None, (1, 2.0)),
        ({}, 16, 1, (1, 2.0)),
        ({}, 16, 5, (2, 1.0)),
        ({"compute.cpus_per_worker": 2}, 16, None, (1, 2.0)),
        ({"compute.num_workers": 2}, 16, None, (1, 1.0)),
        ({"compute.num_workers": 4}, 16, None, (1, 0.5)),
    ],
)
def test_trials_share_two_cores_out(
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    trials: int,
    at_once: int | None,
    expected: tuple[int, float],
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    compute = override(Config(), {**keys, "train.global_batch_size": 16}).compute
    number, reserved = trial_resources(compute, trials=trials, at_once=at_once)
    assert (number, reserved["CPU"]) == expected


def test_tune_stops_what_waits_at_a_rung_but_no_repetition() -> None:
    config = override(Config(), {"train.max_steps": 60, "train.eval_interval": 10})
    rungs = Rungs(Halving(config))  # at steps 10 and 30

    def decision(name: str, row: dict[str, object], *, is_cut: bool = True) -> str:
        run = TrainTask(config, Path(), Path(), threads=1)
        trial = SimpleNamespace(config={"task": TrialTask(name, run, is_cut, reserved={})})
        return rungs.on_trial_result(None, trial, row)

    assert decision("0000", {"step": 5, "train_loss": 1.0}) == "CONTINUE"
    assert decision("0000", {"step": 10, "val_bpb": 2.0}) == "STOP"
    assert decision("0001", {"step": 10, "val_bpb": 3.0}) == "STOP"
    assert decision("0002", {"step": 10, "val_bpb": 1.0}) == "CONTINUE"
    assert decision("0003", {"step": 10, "val_bpb": 9.0}, is_cut=False) == "CONTINUE"
    assert decision("0002", {"outcome": "finished", "last_step": 60}) == "CONTINUE"


def test_a_trial_whose_text_is_gone_may_run_again(tmp_path: Path) -> None:
    run = TrainTask(Config(), tmp_path / "gone", tmp_path, threads=1)
    result = run_trial(TrialTask("0000", run, is_cut=True, reserved={}))
    assert (result["outcome"], result["passing"]) == ("failed", True)
    assert "manifest.json cannot be read" in str(result["message"])


@pytest.mark.parametrize(
    ("shipped", "trials", "rungs"),
    [
        ("data_sweep", "18 drawn", "none, every trial runs to its end"),
        (
            "overfitting_demo",
            "16: the config as it is, 15 drawn",
            "at step 240: the best 1 in 4 continues",
        ),
        (
            "overfitting_sweep",
            "12: the config as it is, 11 drawn",
            "at steps 75, 225: the best 1 in 3 continues",
        ),
    ],
)
def test_a_dry_run_counts_trials_and_names_rungs(
    tmp_path: Path, shipped: str, trials: str, rungs: str
) -> None:
    config = load_config(str(CONFIGS / f"{shipped}.yaml"), [f"storage_path={tmp_path}"])
    told = dict(sweep_plan(check(resolve(config))))
    assert (told["trials"], told["rungs"]) == (trials, rungs)
