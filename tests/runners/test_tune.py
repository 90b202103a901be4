"""Sweeps on Ray Tune, for real: what they leave, how they go on, what makes them fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from gptray.config import Config, RunFailed, UserError, dump, load_config, override
from gptray.data.tokens import TokenData
from gptray.files import sha256_of
from gptray.record import EVENTS, METRICS, read_rows
from gptray.runners.subject import look
from gptray.runners.train import train
from gptray.runners.tune import tune
from gptray.tuning.record import TRIALS, Trial, load_sweep, load_trials, trial_dir
from tests.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
SPACE = [
    {"path": "optim.lr", "grid": [1e-4, 1e20, 2e-2]},
    {"path": "data.split", "grid": ["80:10:10"]},
]
KEYS = ["train.max_steps=30", "train.eval_interval=5", "optim.min_lr=0", "model.dropout=0.1"]


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
    best = load_config(result["best_config"], [f"storage_path={tmp_path}", "name=again"])
    (tmp_path / "data").symlink_to(folder.parent / "data")
    again = train(best)
    assert again["val_loss"] == result["best_val_loss"]
    assert sha256_of(tmp_path / "again" / weights) == sha256_of(folder / weights)


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
    subject = look(load_config(None, [f"evaluate.model={folder}"]))
    assert subject.model_dir == trial_dir(folder, "0003") / "model"
    assert subject.is_own_text and len(subject.text.data.split) == 3
    assert subject.prepared() is not None


def test_a_trial_that_was_under_way_goes_on_from_its_checkpoint(
    config: Config, folder: Path, data_root: Path
) -> None:
    """What a kill leaves: a trial at half its way, others not begun, no winner."""
    calm = load_trials(folder)
    other = data_root / "half"
    shutil.copytree(folder, other, symlinks=True)
    for name in ("best.yaml", "model"):
        path = other / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    gone = ("0003", "0004", "0005", "0006")
    events = (other / TRIALS).read_text().splitlines(keepends=True)
    lines = [json.loads(line) for line in events]
    kept = [
        event
        for event, line in zip(events, lines, strict=True)
        if line["event"] != "winner"
        and (line["trial"] not in gone or (line["trial"] == "0003" and line["event"] != "ended"))
    ]
    (other / TRIALS).write_text("".join(kept) + events[-1][:20])
    for name in gone[1:]:
        shutil.rmtree(trial_dir(other, name))
    run = trial_dir(other, "0003")
    for checkpoint in run.glob("checkpoint_*"):
        if int(checkpoint.name[-6:]) > 25:
            shutil.rmtree(checkpoint)
    before = [sha256_of(trial_dir(other, name) / METRICS) for name in ("0000", "0001", "0002")]
    # The trials' own configs name the folder that they were made in; a moved one is no other.
    tune(override(config, {"name": "half"}))
    after = load_trials(other)
    assert [one.outcome for one in after[:4]] == [one.outcome for one in calm[:4]]
    assert [sha256_of(trial_dir(other, n) / METRICS) for n in ("0000", "0001", "0002")] == before
    assert starts(other, [after[3]])[-1]["step"] == 25
    for one, same in zip(after, calm, strict=True):
        assert one.values == same.values
        assert [(r["step"], r.get("val_loss")) for r in one.rows] == [
            (r["step"], r.get("val_loss")) for r in same.rows
        ]
    assert load_sweep(other).winner == "0003"


def test_a_sweep_of_which_nothing_comes_fails_with_the_reasons(
    tiny_data: TokenData, text_file: Path, data_root: Path
) -> None:
    space = [{"path": "optim.lr", "choice": [1e20]}]
    config = sweep_config(text_file, data_root, "wreck", space=space, baseline=False)
    with pytest.raises(RunFailed, match=r"no trial came to a model:\n  0000 diverged: step \d"):
        tune(config)
    assert (data_root / "wreck" / "report.html").is_file()


@pytest.fixture
def cluster(ray_cluster: None) -> Iterator[dict[str, str]]:
    """The session's Ray, for a driver of its own."""
    import ray

    yield {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def test_a_killed_driver_is_started_again(
    cluster: dict[str, str], tiny_data: TokenData, text_file: Path, data_root: Path
) -> None:
    keys = [f"{key}={value}" for key, value in [("name", "killed"), ("tune.num_samples", 2)]]
    config = tiny_config(text_file, data_root, *KEYS, *keys, "train.max_steps=60")
    space = "[{path: model.dropout, uniform: [0, 0.2]}]"
    given = [f"--config={data_root / 'killed.yaml'}", f"tune.space={space}"]
    (data_root / "killed.yaml").write_text(dump(config))
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), *given]
    driver = subprocess.Popen(command, env=cluster, stderr=subprocess.PIPE, text=True)
    assert driver.stderr
    for line in driver.stderr:
        if line.startswith("trial"):  # one has ended, others run
            break
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    done = subprocess.run(command, env=cluster, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trials"] == 3
    events = read_rows(data_root / "killed" / TRIALS)
    assert sorted(e["trial"] for e in events if e["event"] == "ended") == [
        f"000{number}" for number in range(3)
    ]
    for one in load_trials(data_root / "killed"):
        steps = [row["step"] for row in one.rows]
        assert steps == list(range(1, one.step + 1))
