"""Validation beside the training on a real Ray: the numbers of validation in line, and failures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptray.config import UserError
from gptray.data.tokens import TokenData
from gptray.runners.plan import training_plan
from gptray.runners.sweep_plan import sweep_plan
from gptray.runners.train import train
from gptray.training.loop import fit
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("ray_cluster")
BESIDE = ("train.async_validation=true", "compute.cpus_per_worker=1", "train.eval_interval=5")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a worker of one core has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_sec"} for x in lines]


@pytest.mark.usefixtures("one_thread")
def test_a_spare_worker_gives_the_bits_of_validation_in_line(
    text_file: Path, data_root: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = tiny_config(text_file, data_root, *BESIDE, "name=beside", "train.precision=auto")
    result = train(config)
    run_dir = data_root / "beside"
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
    # A kill may come when everything is done but the last score.
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    last = {k: v for k, v in json.loads(lines[-1]).items() if not k.startswith("val_")}
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    assert train(config)["val_loss"] == result["val_loss"]
    assert timeless(run_dir) == timeless(tmp_path)


def test_what_goes_wrong_in_scoring_is_told(text_file: Path, data_root: Path) -> None:
    # Only whoever samples meets the character that the tokenizer does not know.
    config = tiny_config(
        text_file, data_root, *BESIDE, "name=wrong", "compute.max_failures=0", "sample.prompt=@"
    )
    with pytest.raises(UserError, match="'@'"):
        train(config)


def test_machine_without_a_worker_to_spare_is_refused_before_anything_starts(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cores = len(os.sched_getaffinity(0))
    workers = (f"compute.num_workers={cores}", f"train.global_batch_size={cores}")
    training_plan(tiny_config(text_file, tmp_path, *workers))
    config = tiny_config(text_file, tmp_path, *workers, "train.async_validation=true")
    with pytest.raises(
        UserError, match=rf"async_validation=true .* {cores + 1} cores; .* {cores}\."
    ):
        training_plan(config)


def test_sweep_is_refused(text_file: Path, tmp_path: Path) -> None:
    space = "tune.space=[{path: model.dropout, uniform: [0, 0.3]}]"
    sweep_plan(tiny_config(text_file, tmp_path, space))
    with pytest.raises(UserError, match=r"train\.async_validation=true is for single runs"):
        sweep_plan(tiny_config(text_file, tmp_path, space, "train.async_validation=true"))
