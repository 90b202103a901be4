"""A sweep whose home is an object store: killed, and resumed on a machine that has nothing of it.

Its trials are trained here, one after the other, as Ray Tune would have them trained.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from gptray.config import Config, UserError, load_config, override
from gptray.data.tokens import TokenData
from gptray.jobs.folders.publisher import Sent, SweepPublisher
from gptray.jobs.folders.remote_data import download_data, publish_data
from gptray.jobs.folders.remote_run import publishing
from gptray.jobs.folders.resuming import save_config
from gptray.jobs.folders.run_folder import run_place
from gptray.jobs.tune.check import check
from gptray.jobs.tune.end import outcome
from gptray.jobs.tune.start import opened
from gptray.storage.driver_lock import held
from gptray.storage.files import sha256_of
from gptray.storage.record import EVENTS, read_rows
from gptray.storage.remote_folder import RemoteFolder
from gptray.training.checkpoint import replace_model
from gptray.training.loop import fit
from gptray.tuning.sweep_record import Record, load_sweep, load_trials, trial_dir
from gptray.tuning.trial_plan import choose_winner, plan_trial
from tests.jobs.interrupted import dies
from tests.jobs.test_remote_run import HOME, config_at, prepare
from tests.object_store import ObjectStore

SWEEP, WEIGHTS = f"{HOME}/r", "model/model.safetensors"
SPACE = [{"path": "optim.lr", "grid": [1e-3, 1e-2]}]
# Of the second of two trials.
FIRST = "trials/0001/checkpoint_000002/manifest.json"


def sweep_at(source: Path, home: str = HOME) -> Config:
    words = {"storage_path": home, "tune.space": SPACE, "tune.baseline": False}
    return override(config_at(source), words)


def job(config: Config, *, dies: bool = False) -> dict[str, object]:
    """Run or resume a sweep; or have the process die once the second trial has a checkpoint."""
    checked = check(config)
    config, folder = checked.config, checked.folder
    (text,) = checked.texts.values()
    data_dir = text.request.data_dir
    download_data(config, data_dir)
    publish_data(config, data_dir)
    with held(folder), publishing(config, folder, sweep=True) as publish:
        record = opened(checked)
        known = [one.name for one in load_trials(folder)]
        for one in checked.trials:
            if one.name not in known:
                record.write(
                    "planned",
                    trial=one.name,
                    values=one.values,
                    max_steps=one.config.train.max_steps,
                )

        def report(metrics: dict[str, object], checkpoint: Path | None) -> None:
            publish()
            deadline = time.monotonic() + 200
            while dies and (folder / FIRST).exists() and not is_published():
                assert time.monotonic() < deadline
            if dies and (folder / FIRST).exists():
                os._exit(9)

        for trial in [one for one in load_trials(folder) if not one.outcome]:
            own = plan_trial(config, run_place(config), trial.name, trial.values).config
            run = trial_dir(folder, trial.name)
            run.mkdir(parents=True, exist_ok=True)
            save_config(own, run)
            record.write("started", trial=trial.name)
            fit(
                own, TokenData.open(data_dir), run, report=report, sample=lambda model: [],
                device=torch.device("cpu"),
            )  # fmt: skip
            record.write("ended", trial=trial.name, outcome="finished", step=own.train.max_steps)
        winner = choose_winner(load_trials(folder))
        assert winner
        replace_model(trial_dir(folder, winner.name), folder)
        record.write("winner", trial=winner.name)
    return outcome(load_sweep(folder), run_place(config))


def is_published() -> bool:
    """Whether the store has the second trial's checkpoint, and that the first has ended."""
    home = RemoteFolder(SWEEP)
    return FIRST in home.files(deep=True) and b'"ended"' in (home.read("trials.jsonl") or b"")


@pytest.mark.slow
def test_a_sweep_resumes_on_another_machine_and_trains_nothing_twice(
    store: ObjectStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sweep_at(source)
    prepare(config)
    dies(
        "from tests.jobs.test_remote_sweep import job, sweep_at\n"
        f"job(sweep_at(Path({str(source)!r})), dies=True)"
    )

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other machine"))
    result = job(config)
    there = check(config).folder
    assert (result["sweep_dir"], result["model_dir"]) == (SWEEP, f"{SWEEP}/model")
    assert not list(trial_dir(there, "0000").glob("checkpoint_*"))  # not fetched: it has ended
    starts = [
        [event for event in read_rows(trial_dir(there, name) / EVENTS) if event["event"] == "start"]
        for name in ("0000", "0001")
    ]
    assert [len(of_one) for of_one in starts] == [1, 2]

    storage = tmp_path / "storage"
    local = sweep_at(source, str(storage))
    prepare(local)
    calm = job(local)
    same = ("best_trial", "best_val_loss", "best_step", "trials", "steps_run")
    assert [result[key] for key in same] == [calm[key] for key in same]
    names = {*store.names("bucket/runs/r")}
    for name in ("0000", "0001"):
        weights = f"trials/{name}/{WEIGHTS}"
        assert sha256_of(there / weights) == sha256_of(storage / "r" / weights)
        assert {
            f"trials/{name}/{one}" for one in ("config.yaml", "checkpoint_000006/manifest.json")
        } <= names
    assert sha256_of(there / WEIGHTS) == sha256_of(storage / "r" / WEIGHTS)
    assert {"config.yaml", "trials.jsonl", WEIGHTS, "model/manifest.json"} <= names
    assert not [name for name in names if "lease" in name]
    own = load_config(str(trial_dir(there, "0001") / "config.yaml"), [])
    assert (own.storage_path, own.name) == (f"{SWEEP}/trials", "0001")


def test_a_trial_that_waits_at_a_rung_may_go_on_on_another_machine(
    store: ObjectStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sweep_at(source)
    prepare(config)
    job(config)
    checked = check(config)
    with held(checked.folder), publishing(checked.config, checked.folder, sweep=True) as publish:
        Record(checked.folder).write("ended", trial="0000", outcome="stopped", step=6)
        publish()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other machine"))
    there = check(config).folder
    assert [*trial_dir(there, "0000").glob("checkpoint_*/manifest.json")]
    assert not [*trial_dir(there, "0001").glob("checkpoint_*")]


@pytest.mark.usefixtures("short_leases")
def test_another_machine_is_kept_out_of_a_sweep_that_runs(
    store: ObjectStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sweep_at(source)
    prepare(config)
    checked = check(config)
    with held(checked.folder), publishing(checked.config, checked.folder, sweep=True):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other machine"))
        prepare(config)
        with pytest.raises(UserError, match=f"another job runs the sweep {SWEEP} .process"):
            job(config)


def test_the_store_has_no_record_of_what_is_not_there(store: ObjectStore, tmp_path: Path) -> None:
    folder, put = tmp_path / "r", "PUT /bucket/runs/r/"
    folder.mkdir()
    publisher = SweepPublisher(RemoteFolder(SWEEP), folder, Sent())
    record = Record(folder)
    (folder / "config.yaml").write_text("{}")
    record.write("planned", trial="0000", values={}, max_steps=3)
    record.write("ended", trial="0000", outcome="finished", step=3)
    run = trial_dir(folder, "0000")
    (run / "model").mkdir(parents=True)
    for name in ("metrics.jsonl", "model/config.json", "model/model.safetensors"):
        (run / name).write_text("{}\n")
    publisher.publish()
    sent = [call.removeprefix(put).split("?")[0] for call in store.calls if call.startswith(put)]
    assert [name.split(" ")[0] for name in sent] == [
        "config.yaml", "trials.jsonl", "trials/0000/metrics.jsonl",
        "trials/0000/model/config.json", "trials/0000/model/model.safetensors",
        "trials/0000/model/manifest.json", "trials.jsonl",
    ]  # fmt: skip
    record.write("winner", trial="0000")
    before = len(store.calls)
    publisher.publish()
    (call,) = [call for call in store.calls[before:] if call.startswith("PUT")]
    assert call.startswith(f"{put}trials.jsonl")
    last = store.objects["bucket/runs/r/trials.jsonl"].content.splitlines()[-1]
    assert json.loads(last)["event"] == "winner"
