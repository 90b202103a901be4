"""The loop: the same bits after an interruption, the same losses under any division of work."""

from __future__ import annotations

import hashlib
import math
import os
import re
from pathlib import Path

import pytest
import torch

from gptray.config import Config, override
from gptray.data.tokens import TokenData
from gptray.model.example import load_example
from gptray.model.gpt import GPT
from gptray.native.abi import load_library
from gptray.storage.record import EVENTS, read_rows
from gptray.training.checkpoint import newest_intact
from gptray.training.evaluations import Samples
from tests.generation.models import needs_native
from tests.tiny import tiny_config
from tests.training.runs import Killed, killed_run, rows, run
from tests.two_workers import two_workers

CPU = torch.device("cpu")


def losses(run_dir: Path) -> list[float]:
    return [row["train_loss"] for row in rows(run_dir)]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same_bits(one: Path, other: Path, step: int) -> bool:
    names = [
        f"checkpoint_{step:06d}/model/model.safetensors",
        f"checkpoint_{step:06d}/optimizer.safetensors",
        "model/model.safetensors",
    ]
    return all(digest(one / name) == digest(other / name) for name in names)


@pytest.fixture
def config(text_file: Path, tmp_path: Path) -> Config:
    return tiny_config(text_file, tmp_path)


@needs_native
def test_kernels_that_cannot_be_built_are_told_of_and_done_without(
    config: Config, tiny_data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "g++"
    broken.write_text(
        '#!/bin/sh\ncase "$*" in *" -E "*) exit 0;; esac\necho no headers >&2; exit 1\n'
    )
    broken.chmod(0o755)
    # By PATH: inductor keeps the CXX that it meets first.
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_library.cache_clear()
    bf16 = override(config, {"train.precision": "bf16", "train.max_steps": 1})
    assert run(bf16, tiny_data, tmp_path / "run")["stopped"] == "max_steps"
    building, notice, start = read_rows(tmp_path / "run" / EVENTS)[:3]
    assert building["event"] == "building"
    assert notice["event"] == "notice" and "no headers" in notice["message"]
    assert "train.backend=torch" in notice["message"]
    assert start["event"] == "start" and start["backend"] == "torch"
    native = run(override(bf16, {"train.backend": "native"}), tiny_data, tmp_path / "native")
    assert native["stopped"] == "failed" and "no headers" in native["message"]


def test_loss_falls_and_every_step_has_one_row(
    config: Config, tiny_data: TokenData, tmp_path: Path
) -> None:
    result = run(config, tiny_data, tmp_path)
    assert result["stopped"] == "max_steps"
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 21))
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.5
    assert losses(tmp_path)[0] == pytest.approx(math.log(tiny_data.vocab_size), abs=0.3)
    evaluated = rows(tmp_path)[-1]
    assert evaluated["val_ppl"] == pytest.approx(math.exp(evaluated["val_loss"]))
    assert evaluated["gap"] == pytest.approx(evaluated["val_loss"] - evaluated["train_loss"])


def test_the_model_folder_has_a_prompt_from_validation_text(
    config: Config, tiny_data: TokenData, tmp_path: Path
) -> None:
    run(
        override(config, {"train.max_steps": 2, "train.eval_interval": 2}),
        tiny_data,
        tmp_path / "r",
    )
    example = load_example(tmp_path / "r" / "model")
    validation = tiny_data.tokenizer.decode(tiny_data.val.slice(0, 2000).tolist())
    assert example and example.prompt in validation and not example.parse_special


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_run_ends_with_the_same_bits(
    text_file: Path, tiny_data: TokenData, tmp_path: Path, dropout: float, precision: str
) -> None:
    config = tiny_config(
        text_file,
        tmp_path,
        "train.max_steps=30",
        f"model.dropout={dropout}",
        f"data.token_replacement={dropout}",
        f"train.precision={precision}",
    )
    run(config, tiny_data, tmp_path / "whole")
    killed_run(config, tiny_data, tmp_path / "killed", at=(10, 20))
    assert same_bits(tmp_path / "whole", tmp_path / "killed", 30)
    timeless = [
        [{k: v for k, v in row.items() if k != "tokens_per_sec"} for row in rows(tmp_path / name)]
        for name in ("whole", "killed")
    ]
    assert timeless[0] == timeless[1]


def test_rows_after_the_checkpoint_are_written_once(
    config: Config, tiny_data: TokenData, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(config, tiny_data, tmp_path, kill_at=10)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # steps whose checkpoint never came
        file.write('{"step": 11, "train_loss": 9.0}\n{"step": 12, "train')
    run(config, tiny_data, tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 21))
    assert 9.0 not in losses(tmp_path)


def test_damaged_checkpoint_is_passed_over_for_the_one_before(
    config: Config, tiny_data: TokenData, tmp_path: Path
) -> None:
    run(config, tiny_data, tmp_path / "whole")
    run(config, tiny_data, tmp_path / "hurt")
    weights = tmp_path / "hurt" / "checkpoint_000020" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    run(config, tiny_data, tmp_path / "hurt")
    assert same_bits(tmp_path / "whole", tmp_path / "hurt", 20)
    events = (tmp_path / "hurt" / "events.jsonl").read_text()
    assert "checkpoint_000020 is damaged: model/model.safetensors" in events


def test_no_whole_checkpoint_stops_the_run(
    config: Config, tiny_data: TokenData, tmp_path: Path
) -> None:
    run(config, tiny_data, tmp_path)
    for folder in tmp_path.glob("checkpoint_*"):
        (folder / "trainer.json").unlink()
    result = run(config, tiny_data, tmp_path)
    assert result["stopped"] == "failed" and not result["mistake"]
    assert re.search(r"(?s)no checkpoint .* intact.*checkpoint_000010", result["message"])


def test_micro_batches_add_up_to_the_same_losses(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    for size in (1, 4, 8):
        keys = [f"train.micro_batch_size={size}", "data.token_replacement=0.2"]
        config = tiny_config(text_file, tmp_path, *keys)
        run(config, tiny_data, tmp_path / str(size))
    reference = losses(tmp_path / "8")
    assert losses(tmp_path / "1") == pytest.approx(reference, abs=1e-5)
    assert losses(tmp_path / "4") == pytest.approx(reference, abs=1e-5)


def _worker(rank: int, runs: dict[Path, Config], data_dir: Path) -> None:
    for run_dir, config in runs.items():
        run(config, TokenData.open(data_dir), run_dir)


@pytest.mark.slow
def test_two_workers_see_the_same_batches_and_losses_as_one(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    run(tiny_config(text_file, tmp_path), tiny_data, tmp_path / "one")
    # In micro-batches of 1 and of 4 by the same two processes, which take seconds to start.
    runs = {
        tmp_path / f"two-{size}": tiny_config(
            text_file, tmp_path, "compute.num_workers=2", f"train.micro_batch_size={size}"
        )
        for size in (1, 4)
    }
    # One micro-batch for two workers, and dropout by micro-batches.
    elastic = ["compute.num_workers=[1, 2]", "train.micro_batch_size=8"]
    runs[tmp_path / "uneven"] = tiny_config(text_file, tmp_path, *elastic)
    dropping = ["model.dropout=0.1", "data.token_replacement=0.1", "train.micro_batch_size=4"]
    run(tiny_config(text_file, tmp_path, *dropping), tiny_data, tmp_path / "dropping-one")
    dropping.append("compute.num_workers=2")
    dropping_run = tmp_path / "dropping-two"
    runs[dropping_run] = tiny_config(text_file, tmp_path, *dropping)
    two_workers(_worker, runs, tiny_data.data_dir)
    assert losses(dropping_run) == pytest.approx(losses(tmp_path / "dropping-one"), abs=1e-5)
    del runs[dropping_run]
    one = rows(tmp_path / "one")[-1]
    for run_dir in runs:
        assert losses(run_dir) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
        two = rows(run_dir)[-1]
        assert two["val_loss"] == pytest.approx(one["val_loss"], abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_early_stop_ends_the_run_and_keeps_the_best_model(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = tiny_config(
        text_file,
        tmp_path,
        "optim.lr=0.3",  # far too high: validation loss soon goes up
        "optim.min_lr=0.3",
        "train.eval_interval=2",
        "train.max_steps=200",
        "train.patience=3",
        "compute.num_to_keep=1",
    )
    result = run(config, tiny_data, tmp_path)
    evaluations = {row["step"]: row["val_loss"] for row in rows(tmp_path) if "val_loss" in row}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert result["stopped"] == "patience"
    assert result["step"] == max(evaluations) < 200
    assert list(evaluations).index(best) < len(evaluations) - 3 + 1
    published = digest(tmp_path / "model" / "model.safetensors")
    assert published == digest(tmp_path / f"checkpoint_{best:06d}" / "model" / "model.safetensors")
    again = run(config, tiny_data, tmp_path)
    assert again["stopped"] == "patience" and again["step"] == result["step"]


def test_patience_survives_a_kill(text_file: Path, tiny_data: TokenData, tmp_path: Path) -> None:
    config = tiny_config(
        text_file,
        tmp_path,
        "train.min_delta=100",  # nothing is ever better
        "train.eval_interval=2",
        "train.max_steps=100",
        "train.patience=4",
    )
    assert run(config, tiny_data, tmp_path / "whole")["step"] == 10
    assert killed_run(config, tiny_data, tmp_path / "killed", at=(4, 8))["step"] == 10


@pytest.mark.parametrize("eval_interval", [1, 10])
def test_non_finite_numbers_stop_the_run_and_keep_the_last_good_checkpoint(
    config: Config, text_file: Path, tiny_data: TokenData, tmp_path: Path, eval_interval: int
) -> None:
    with pytest.raises(Killed):
        run(config, tiny_data, tmp_path, kill_at=10)
    good = digest(tmp_path / "model" / "model.safetensors")
    diverging = tiny_config(
        text_file,
        tmp_path,
        "optim.lr=1e20",
        "optim.min_lr=1e20",
        "optim.max_grad_norm=null",
        f"train.eval_interval={eval_interval}",
    )
    result = run(diverging, tiny_data, tmp_path)
    assert result["stopped"] == "non_finite"
    assert "loss" in result["message"] and "nan" in result["message"].lower()
    assert newest_intact(tmp_path)[0] == tmp_path / "checkpoint_000010"
    assert digest(tmp_path / "model" / "model.safetensors") == good
    assert all(math.isfinite(row["train_loss"]) for row in rows(tmp_path))


@pytest.mark.slow
def test_compiled_loop_trains(text_file: Path, tiny_data: TokenData, tmp_path: Path) -> None:
    if os.system("c++ --version > /dev/null 2>&1"):
        pytest.skip("needs a C++ compiler")
    one_layer = tiny_config(text_file, tmp_path, "model.n_layer=1")
    run(one_layer, tiny_data, tmp_path / "eager")
    run(override(one_layer, {"train.compile": True}), tiny_data, tmp_path / "compiled")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-3)


def _out_of_memory(rank: int, config: Config, data_dir: Path, run_dir: Path) -> None:
    def sample(model: GPT) -> Samples:
        assert rank == 0
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    try:
        run(config, TokenData.open(data_dir), run_dir, sample=sample)
    except RuntimeError as error:  # also of the second, whose neighbour is gone
        (run_dir / f"rank-{rank}").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.slow
def test_what_one_worker_alone_fails_by_is_not_taken_for_the_failure_of_all(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = tiny_config(text_file, tmp_path, "compute.num_workers=2", "train.micro_batch_size=2")
    two_workers(_out_of_memory, config, tiny_data.data_dir, tmp_path)
    first, second = ((tmp_path / f"rank-{rank}").read_text() for rank in (0, 1))
    assert first.startswith("WorkerFailed: the GPU is out of memory (Tried to allocate 2.00 GiB)")
    assert "lower train.micro_batch_size from 2" in first
    assert "closed by peer" in second
