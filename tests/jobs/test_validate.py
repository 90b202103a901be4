"""Asynchronous validation on a real Ray: the numbers of blocking validation, and failures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gptray.config import UserError, override
from gptray.data.tokens import TokenData
from gptray.jobs.folders.resuming import is_finished, save_config
from gptray.jobs.folders.run_folder import resolve
from gptray.jobs.train.check import check
from gptray.jobs.train.fitting import fit_on_ray
from gptray.jobs.train.run import train
from gptray.jobs.tune.check import check as check_sweep
from gptray.training.loop import fit
from gptray.training.stopping import EarlyStopping
from gptray.training.trainer_state import TrainerState
from tests.tiny import tiny_config

BESIDE = ("train.async_validation=true", "compute.cpus_per_worker=1", "train.eval_interval=5")


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_sec"} for x in lines]


@pytest.mark.usefixtures("ray_cluster")
def test_spare_worker_tells_what_goes_wrong_and_gives_the_bits_of_validation_in_line(
    text_file: Path, data_root: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = tiny_config(text_file, data_root, *BESIDE, "name=beside", "train.precision=auto")
    run_dir = data_root / "beside"
    mistaken = resolve(override(config, {"sample.prompt": "@", "compute.max_failures": 0}))
    with pytest.raises(UserError, match="^sample.prompt='@': "):
        train(mistaken)
    assert not run_dir.exists()
    # Without that check, only who samples meets the mistake, and that is the spare worker.
    run_dir.mkdir()
    save_config(mistaken, run_dir)
    with pytest.raises(UserError, match="'@'"):
        fit_on_ray(mistaken, tiny_data.data_dir, run_dir)
    assert "val_loss" not in timeless(run_dir)[4]
    result = train(config)
    fit(
        config,
        tiny_data,
        tmp_path,
        report=lambda *_: None,
        sample=lambda model: [],
        device=torch.device("cpu"),
    )
    assert timeless(run_dir) == timeless(tmp_path)
    weights = "model/model.safetensors"
    assert (run_dir / weights).read_bytes() == (tmp_path / weights).read_bytes()
    assert result["step"] == 20 and result["stopped"] == "max_steps"
    events = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    samples = {one["step"]: one["samples"] for one in events if one["event"] == "evaluated"}
    assert list(samples) == [5, 10, 15, 20] and all(samples.values())


def test_run_is_not_finished_before_its_last_score(text_file: Path, tmp_path: Path) -> None:
    state = TrainerState(step=20, progress=EarlyStopping(), data="")
    beside = tiny_config(text_file, tmp_path, *BESIDE)
    path = tmp_path / "metrics.jsonl"
    for last, is_over in (({"step": 20}, False), ({"step": 20, "val_loss": 2.0}, True)):
        rows = [{**row, "train_loss": 1.0} for row in ({"step": 15}, last)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert is_finished(beside, tmp_path, state) is is_over
        assert is_finished(tiny_config(text_file, tmp_path), tmp_path, state)


def test_machine_without_a_worker_to_spare_is_refused_before_anything_starts(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cores = len(os.sched_getaffinity(0))
    workers = (f"compute.num_workers={cores}", f"train.global_batch_size={cores}")
    check(tiny_config(text_file, tmp_path, *workers))
    config = tiny_config(text_file, tmp_path, *workers, "train.async_validation=true")
    with pytest.raises(
        UserError, match=rf"async_validation=true .* {cores + 1} cores; .* {cores}\."
    ):
        check(config)


def test_sweep_is_refused(text_file: Path, tmp_path: Path) -> None:
    space = "tune.space=[{path: model.dropout, uniform: [0, 0.3]}]"
    check_sweep(tiny_config(text_file, tmp_path, space))
    with pytest.raises(UserError, match=r"train\.async_validation=true is for single runs"):
        check_sweep(tiny_config(text_file, tmp_path, space, "train.async_validation=true"))
