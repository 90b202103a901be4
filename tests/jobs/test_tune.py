"""Sweeps on Ray Tune, for real: what they leave, how they go on, what makes them fail."""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

from gptray.config import Config, RunFailed, TuneConfig, UserError, dump, load_config, override
from gptray.data.tokens import TokenData
from gptray.jobs.evaluate.check import check as check_evaluation
from gptray.jobs.folders.resuming import save_config
from gptray.jobs.folders.run_folder import resolve
from gptray.jobs.prepare.check import check_text
from gptray.jobs.train.run import train
from gptray.jobs.tune.check import check
from gptray.jobs.tune.run import tune
from gptray.storage.files import sha256_of
from gptray.storage.record import EVENTS, METRICS, read_rows
from gptray.training.loop import fit
from gptray.tuning.sweep_record import TRIALS, Record, Trial, load_sweep, load_trials, trial_dir
from tests.conftest import RAY_ACCESS
from tests.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
# The last learning rate is the best at every rung, so that it wins whichever trial comes first.
SPACE = [
    {"path": "optim.lr", "grid": [1e-4, 1e20, 1e-2]},
    {"path": "data.split", "grid": ["80:10:10"]},
]
KEYS = [
    "train.max_steps=30", "train.eval_interval=5", "optim.lr=0.003", "optim.min_lr=0",
    "model.dropout=0.1",
]  # fmt: skip


def sweep_config(text_file: Path, storage: Path, name: str, *keys: str, **tune: Any) -> Config:
    config = tiny_config(text_file, storage, f"name={name}", *KEYS, *keys)
    return override(config, {f"tune.{key}": value for key, value in tune.items()})


@pytest.fixture(scope="module")
def config(tiny_data: TokenData, text_file: Path, data_root: Path) -> Config:
    return sweep_config(text_file, data_root, "sweep", space=SPACE, replicates=1)


@pytest.fixture(scope="module")
def result(config: Config) -> dict[str, Any]:
    """The JSON line of a sweep: the config as it is, three trials of a grid, three repetitions."""
    return tune(config)


@pytest.fixture
def folder(result: dict[str, Any]) -> Path:
    return Path(result["sweep_dir"])


def starts(folder: Path, trials: list[Trial]) -> list[dict[str, Any]]:
    events = [event for one in trials for event in read_rows(trial_dir(folder, one.name) / EVENTS)]
    return [event for event in events if event["event"] == "start"]


def test_a_sweep_is_left_for_optuna_and_tensorboard(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "optuna.log").read_text().splitlines()]
    created = [line["user_attrs"]["trial"] for line in lines if line["op_code"] == 4]
    assert created == [trial.name for trial in load_trials(folder)]
    for name in created:
        assert len([*(folder / "trials" / name / "tensorboard" / name).glob("*.hparams")]) == 2


def test_every_trial_ends_and_one_that_diverges_is_marked(
    result: dict[str, Any], folder: Path
) -> None:
    trials = load_trials(folder)
    assert len(trials) == result["trials"] == 7
    assert trials[2].outcome == "diverged" and "loss" in (trials[2].message or "")
    assert {one.outcome for one in trials} <= {"finished", "stopped", "diverged"}
    assert [one.replicate_of for one in trials[:4]] == [None] * 4
    assert all(one.outcome == "finished" for one in trials[4:])
    assert result["steps_full"] == 7 * 30
    assert result["steps_run"] == sum(one.step for one in trials) < 7 * 30
    assert result["best_trial"] == "0003"
    assert not (folder / ".ray").exists()


def test_a_trial_that_is_promoted_goes_on_from_its_checkpoint(
    result: dict[str, Any], folder: Path
) -> None:
    promoted = {row["trial"] for row in read_rows(folder / TRIALS) if row["event"] == "promoted"}
    assert "0003" in promoted  # at the last rung it was alone
    rows = read_rows(trial_dir(folder, "0003") / METRICS)
    assert [row["step"] for row in rows] == list(range(1, 31))
    (begun, *gone_on) = starts(folder, [load_trials(folder)[3]])
    assert begun["step"] == 0 and {start["step"] for start in gone_on} <= {5, 15}
    assert gone_on


def test_trials_share_processes_and_texts(folder: Path) -> None:
    trials = load_trials(folder)
    assert len({event["pid"] for event in starts(folder, trials)}) < len(trials)
    assert (
        len({os.path.realpath(trial_dir(folder, one.name) / ".." / "data") for one in trials}) == 1
    )
    found = {}
    for data_dir in {p for p in (folder.parent / "data").iterdir() if p.name[0] != "."}:
        data = TokenData.open(data_dir)
        found[len(data.splits)] = data.val.slice(0, len(data.val)).tolist()
    assert found[2] == found[3]


def test_the_winner_is_kept_and_trains_again_to_the_same_bits(
    result: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    winner = trial_dir(folder, result["best_trial"])
    weights = "model/model.safetensors"
    assert sha256_of(folder / weights) == sha256_of(winner / weights)
    best = load_config(result["best_config"], [])
    assert (best.name, best.tune, best.storage_path) == (None, TuneConfig(), str(folder.parent))
    assert best.compute.cpus_per_worker == 1
    data = check_text(best).data
    assert data
    losses = []
    fit(
        best,
        data,
        tmp_path,
        report=lambda metrics, _: losses.append(metrics["val_loss"]),
        sample=lambda model: [],
        device=torch.device("cpu"),
    )
    assert min(losses) == result["best_val_loss"]
    assert sha256_of(tmp_path / weights) == sha256_of(folder / weights)


def test_a_finished_sweep_says_the_same_again_and_refuses_other_settings(
    config: Config, result: dict[str, Any], folder: Path
) -> None:
    before = (folder / TRIALS).read_bytes()
    assert tune(config) == result
    assert (folder / TRIALS).read_bytes() == before
    with pytest.raises(UserError, match=r"tune.grace_period: 1 there, 2 now"):
        tune(override(config, {"tune.grace_period": 2}))
    with pytest.raises(UserError, match="is a sweep, not a run"):
        train(config)
    table = parquet.read_table(folder / "trials.parquet")
    assert table.num_rows == 7 and (folder / "report.html").is_file()


def test_a_sweep_is_evaluated_as_its_winner(folder: Path) -> None:
    checked = check_evaluation(load_config(None, [f"evaluate.model={folder}"]))
    assert checked.found.folder == trial_dir(folder, "0003") / "model"
    assert checked.is_own_text and len(checked.text.config.data.split) == 3
    assert checked.text.data is not None


def test_a_sweep_of_which_nothing_comes_fails_with_the_reasons(
    tiny_data: TokenData, text_file: Path, data_root: Path
) -> None:
    space = [{"path": "model.dropout", "choice": [0.2]}]
    plan = check(sweep_config(text_file, data_root, "wreck", space=space, baseline=False))
    plan.folder.mkdir()
    save_config(plan.config, plan.folder)
    record = Record(plan.folder)
    record.write("planned", trial="0000", values=plan.trials[0].values, max_steps=30)
    record.write("ended", trial="0000", outcome="diverged", step=7, message="step 8: loss nan")
    with pytest.raises(
        RunFailed, match="no trial produced a model:\n  0000 diverged: step 8: loss nan"
    ):
        tune(plan.config)
    assert (plan.folder / "report.html").is_file()


def test_trials_that_could_not_write_run_again_before_anything_wins(
    tiny_data: TokenData, text_file: Path, data_root: Path
) -> None:
    space = [{"path": "model.dropout", "uniform": [0, 0.3]}]
    keys = ("train.max_steps=10", "optim.lr=0.02")
    config = sweep_config(text_file, data_root, "full", *keys, space=space, num_samples=2)
    folder = data_root / "full"
    in_the_way = trial_dir(folder, "0001") / ".checkpoint_000005.tmp"
    in_the_way.parent.mkdir(parents=True)
    os.mkfifo(in_the_way)  # neither a file nor a folder, which a killed attempt could leave
    save_config(resolve(config), folder)
    message = (
        r"1 of 3 trials failed: cannot write .*0001/checkpoint_000005: it is neither a file .*; "
        "the same command runs them again; with tune.retry_failed=false the best of the others"
    )
    with pytest.raises(RunFailed, match=message):
        tune(config)
    assert load_sweep(folder).winner is None and not (folder / "best.yaml").exists()
    others: dict[str, Any] = tune(override(config, {"tune.retry_failed": False}))
    assert others["outcomes"]["failed"] == 1 and others["best_trial"] != "0001"
    in_the_way.unlink()
    again: dict[str, Any] = tune(config)
    assert again["outcomes"]["failed"] == 0 and again["trials"] == 3
    more = tune(override(config, {"tune.num_samples": 3}))
    trials = load_trials(folder)
    assert more["trials"] == 4 and trials[3].outcome in ("finished", "stopped")
    assert len(starts(folder, [trials[1]])) > 1
    assert load_sweep(folder).winner == more["best_trial"]


def test_a_sweep_stops_itself_and_goes_on_if_it_is_told_to(
    tiny_data: TokenData, text_file: Path, data_root: Path
) -> None:
    space = [{"path": "model.dropout", "uniform": [0, 0.3]}]
    keys = ("train.max_steps=2", "train.eval_interval=2")
    config = sweep_config(
        text_file, data_root, "enough", *keys, space=space, num_samples=34, min_gain=0.5
    )
    stopped: dict[str, Any] = tune(config)
    why = stopped["stopped_early"]
    # The config as it is, thirty that it is judged by, and those that ran beside the thirtieth.
    assert 31 <= stopped["trials"] == why["trials"] < 35 == why["of"]
    assert 0 < why["gain"] < why["gain_at_most"] < why["min_gain"] == 0.5
    trials = load_trials(data_root / "enough")
    assert [one.outcome for one in trials[: why["trials"]]] == ["finished"] * why["trials"]
    assert {one.outcome for one in trials[why["trials"] :]} == {"skipped"}
    assert tune(config) == stopped
    whole = tune(override(config, {"tune.min_gain": 0.0}))
    assert (whole["trials"], whole["stopped_early"]) == (35, None)


@pytest.mark.parametrize(
    ("grace_period", "workers"),
    # With a rung, it stops there and resumes: for its workers there is room again.
    [pytest.param(2, [2], marks=pytest.mark.chaos), (1, [2, 2])],
)
def test_a_trial_of_two_workers_runs_to_its_end(
    tiny_data: TokenData, text_file: Path, data_root: Path, grace_period: int, workers: list[int]
) -> None:
    space = [{"path": "model.dropout", "choice": [0.2]}]
    keys = (
        "compute.num_workers=2", "train.max_steps=10", f"tune.grace_period={grace_period}",
    )  # fmt: skip
    name = f"two-{grace_period}"
    config = sweep_config(text_file, data_root, name, *keys, space=space, baseline=False)
    done: dict[str, Any] = tune(config)
    assert done["outcomes"]["finished"] == 1
    folder = data_root / name
    (trial,) = load_trials(folder)
    assert trial.step == 10
    assert [event["workers"] for event in starts(folder, [trial])] == workers


@pytest.fixture
def environment(ray_cluster: None) -> dict[str, str]:
    """The session's Ray, for a driver of its own."""
    import ray

    address = ray.get_runtime_context().gcs_address
    return {**os.environ, **RAY_ACCESS, "RAY_ADDRESS": address}


@pytest.mark.chaos
def test_a_killed_driver_started_again_changes_nothing(
    environment: dict[str, str], config: Config, folder: Path
) -> None:
    killed = folder.parent / "killed"
    path = folder.parent / "killed.yaml"
    path.write_text(dump(override(config, {"name": "killed"})))
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), f"--config={path}"]
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert driver.stderr
    for line in driver.stderr:
        if line.startswith("trial"):  # one has ended, others run
            break
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best_trial"] == "0003"
    events = read_rows(killed / TRIALS)
    names = [trial.name for trial in load_trials(folder)]
    ends = collections.Counter(event["trial"] for event in events if event["event"] == "ended")
    ends.subtract(event["trial"] for event in events if event["event"] == "promoted")
    assert ends == dict.fromkeys(names, 1)
    for one, calm in zip(load_trials(killed), load_trials(folder), strict=True):
        # How far rungs let a trial go depends on who came first; what it measures does not.
        both = min(len(one.rows), len(calm.rows))
        assert [row["step"] for row in one.rows] == list(range(1, one.step + 1))
        if one.values == calm.values:
            assert [timeless(row) for row in one.rows[:both]] == [
                timeless(row) for row in calm.rows[:both]
            ]


def timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "tokens_per_sec"}
