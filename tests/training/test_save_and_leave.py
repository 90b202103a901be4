"""A worker's request to save or leave, after which the run ends as if there had been none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptray.config import Config
from gptray.data.tokens import TokenData
from gptray.training.checkpoint import checkpoint_folder
from gptray.training.loop import fit
from gptray.training.numbers import Action
from tests.tiny import tiny_config
from tests.training.runs import rows, run
from tests.training.test_evaluations import Scorer, digest, timeless

CPU = torch.device("cpu")


def run_with(
    config: Config,
    data: TokenData,
    run_dir: Path,
    at: int,
    request: Action,
    *,
    beside: bool = False,
) -> Any:
    """Train; a request comes up at step `at`, counted from the run's start here."""
    requests = iter([Action.NONE] * (at - 1) + [request])
    scorer = Scorer(config, data)
    return fit(
        config,
        data,
        run_dir,
        report=scorer.report if beside else lambda *_: None,
        sample=lambda model: [],
        device=CPU,
        validated=scorer.validated if beside else None,
        request=lambda: next(requests, Action.NONE),
    )


@pytest.mark.parametrize("beside", [False, True])
def test_a_run_that_is_left_between_evaluations_goes_on_as_if_it_had_not_been(
    text_file: Path, tiny_data: TokenData, tmp_path: Path, beside: bool
) -> None:
    config = tiny_config(
        text_file, tmp_path, "model.dropout=0.1", "train.eval_interval=5", "train.log_interval=4"
    )
    whole, left = tmp_path / "whole", tmp_path / "left"
    run_with(config, tiny_data, whole, 1, Action.NONE, beside=beside)
    for at, step in ((7, 7), (6, 13), (2, 15)):
        result = run_with(config, tiny_data, left, at, Action.LEAVE, beside=beside)
        assert result["stopped"] == "left" and result["step"] == step
        assert checkpoint_folder(left, step).is_dir()
    assert (
        run_with(config, tiny_data, left, 1, Action.NONE, beside=beside)["stopped"] == "max_steps"
    )
    assert timeless(left) == timeless(whole)
    assert [row["step"] for row in rows(left)] == [4, 5, 8, 10, 12, 15, 16, 20]
    for name in ("model/model.safetensors", "checkpoint_000020/optimizer.safetensors"):
        assert digest(left / name) == digest(whole / name)


def test_a_request_to_save_keeps_the_step_and_training_goes_on(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = tiny_config(text_file, tmp_path)
    result = run_with(config, tiny_data, tmp_path / "r", 17, Action.SAVE)
    assert result["stopped"] == "max_steps"
    assert checkpoint_folder(tmp_path / "r", 17).is_dir()


def test_a_request_at_the_last_step_ends_no_run(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = tiny_config(text_file, tmp_path, "train.max_steps=3")
    assert run_with(config, tiny_data, tmp_path, 3, Action.LEAVE)["stopped"] == "max_steps"
    assert run(config, tiny_data, tmp_path)["step"] == 3
