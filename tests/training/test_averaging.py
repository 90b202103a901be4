"""Averaged weights: their formula, their score, and that the better of the two are the run's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gptray.config import UserError, load_config
from gptray.data.scoring import Score
from gptray.data.tokens import TokenData
from gptray.training.averaging import Average
from gptray.training.checkpoint import checkpoint_folder, find_checkpoints
from gptray.training.trainer_state import TrainerState
from gptray.training.validation import Scores, score_checkpoint
from tests.tiny import tiny_config
from tests.training.runs import CPU, killed_run, rows, run
from tests.training.test_evaluations import digest, timeless

NOISY = ("optim.schedule=constant", "optim.lr=0.05", "optim.min_lr=0.01", "train.eval_interval=5")


def test_the_average_forgets_as_its_formula_says() -> None:
    model = nn.Linear(3, 2)
    average = Average(model, 0.5)
    expected = [weight.detach().clone() for weight in model.parameters()]
    for updates in range(1, 30):
        decay = min(0.5, (1 + updates) / (10 + updates))
        with torch.no_grad():
            for weight, mean in zip(model.parameters(), expected, strict=True):
                weight.add_(torch.randn_like(weight))
                mean.mul_(decay).add_(weight, alpha=1 - decay)
        average.update(updates)
    weights = [weight.detach().clone() for weight in model.parameters()]
    with average.swapped():
        for weight, mean in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(weight.detach(), mean)
    assert all(map(torch.equal, model.parameters(), weights))


def test_the_better_of_weights_and_average_is_the_evaluations_and_the_runs(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = tiny_config(text_file, tmp_path, *NOISY, "train.ema=0.8")
    run(config, tiny_data, tmp_path / "r")
    evaluated = [row for row in rows(tmp_path / "r") if "val_loss" in row]
    assert [row["step"] for row in evaluated] == [5, 10, 15, 20]
    for row in evaluated:
        assert row["val_loss"] == min(row["val_loss_own"], row["val_loss_ema"])
    best = min(evaluated, key=lambda row: row["val_loss"])
    assert best["val_loss_ema"] < best["val_loss_own"]  # or the test shows nothing
    folder = checkpoint_folder(tmp_path / "r", best["step"])
    published = digest(tmp_path / "r" / "model" / "model.safetensors")
    assert published == digest(folder / "averaged" / "model.safetensors")
    assert published != digest(folder / "model" / "model.safetensors")
    scores, model = score_checkpoint(config, tiny_data, folder, CPU, run_dir=folder.parent)
    assert scores.better.loss == best["val_loss"] and scores.own.loss == best["val_loss_own"]
    stored = load_file(folder / "averaged" / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(model.transformer.wte.weight[: len(stored)].detach(), stored)
    assert TrainerState.load(find_checkpoints(tmp_path / "r")[0]).progress.averaged


def test_averaging_changes_nothing_of_the_weights_and_survives_a_kill(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    plain = tiny_config(text_file, tmp_path, *NOISY, "model.dropout=0.1")
    config = tiny_config(text_file, tmp_path, *NOISY, "model.dropout=0.1", "train.ema=0.8")
    run(plain, tiny_data, tmp_path / "plain")
    run(config, tiny_data, tmp_path / "whole")
    killed_run(config, tiny_data, tmp_path / "killed", at=(5, 15))
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    for name in ("averaged/model.safetensors", "model/model.safetensors"):
        ours = tmp_path / "killed" / "checkpoint_000020" / name
        assert digest(ours) == digest(tmp_path / "whole" / "checkpoint_000020" / name)
    for name in ("optimizer.safetensors", "model/model.safetensors"):
        ours = tmp_path / "plain" / "checkpoint_000020" / name
        assert digest(ours) == digest(tmp_path / "whole" / "checkpoint_000020" / name)


def test_an_average_is_only_better_when_its_loss_is_lower() -> None:
    own, lower, same = Score(2.0, 9, 9), Score(1.9, 9, 9), Score(2.0, 9, 9)
    assert Scores(own, lower).is_averaged and Scores(own, lower).better is lower
    assert not Scores(own, same).is_averaged and Scores(own, same).better is own
    assert Scores(own).better is own


def test_averages_of_sharded_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"train.ema .*combined with compute.strategy=fsdp"):
        load_config(None, ["train.ema=0.9", "compute.strategy=fsdp"])
