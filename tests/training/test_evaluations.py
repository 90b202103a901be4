"""Asynchronous validation: numbers and end of blocking validation, also when killed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptray.config import Config
from gptray.data.scoring import Score
from gptray.data.tokens import TokenData
from gptray.training.checkpoint import checkpoint_folder, find_checkpoints, newest_intact
from gptray.training.evaluations import Validation
from gptray.training.loop import fit
from gptray.training.validation import Scores, score_checkpoint
from tests.tiny import tiny_config

CPU = torch.device("cpu")


class Killed(BaseException):
    """Ends a run where a kill would."""


class Scorer:
    """Scores what is reported only when it is asked for, so as late as can be."""

    def __init__(self, config: Config, data: TokenData, *, kill: str = "") -> None:
        self._config, self._data, self._kill = config, data, kill
        self._reported: dict[int, Path] = {}

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        assert checkpoint
        self._reported[metrics["step"]] = checkpoint
        if self._kill == f"reported {metrics['step']}":
            raise Killed

    def validated(self, step: int) -> Validation:
        folder = self._reported[step]
        if self._kill == f"scoring {step}":
            raise Killed
        scores, _ = score_checkpoint(self._config, self._data, folder, CPU, run_dir=folder.parent)
        return Validation(scores, [("once", f"at {step}")])


def in_line(config: Config, data: TokenData, run_dir: Path) -> Any:
    def sample(model: object) -> list[tuple[str, str]]:
        return [("once", "upon")]

    return fit(config, data, run_dir, report=lambda *_: None, sample=sample, device=CPU)


def beside(config: Config, data: TokenData, run_dir: Path, *, kill: str = "") -> Any:
    scorer = Scorer(config, data, kill=kill)
    return validate_by(scorer.validated, scorer, config, data, run_dir)


def validate_by(
    validated: Callable[[int], Validation],
    scorer: Scorer,
    config: Config,
    data: TokenData,
    run_dir: Path,
) -> Any:
    def sample(model: object) -> list[tuple[str, str]]:
        raise AssertionError("whoever scores a checkpoint samples from it")

    report = scorer.report
    return fit(config, data, run_dir, report=report, sample=sample, device=CPU, validated=validated)


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_sec"} for x in lines]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights(run_dir: Path) -> str:
    return digest(run_dir / "model" / "model.safetensors")


def falling(text_file: Path, tmp_path: Path) -> Config:
    return tiny_config(text_file, tmp_path, "model.dropout=0.1", "train.eval_interval=5")


def rising(text_file: Path, tmp_path: Path) -> Config:
    """A run that soon gets no better: the learning rate is far too high."""
    return tiny_config(
        text_file,
        tmp_path,
        "seed=2",
        "optim.lr=0.1",
        "optim.min_lr=0.1",
        "train.eval_interval=2",
        "train.max_steps=200",
        "train.patience=3",
        "compute.num_to_keep=1",
    )


def test_numbers_are_those_of_validation_in_line(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = falling(text_file, tmp_path)
    assert in_line(config, tiny_data, tmp_path / "in line")["stopped"] == "max_steps"
    result = beside(config, tiny_data, tmp_path / "beside")
    rows = timeless(tmp_path / "beside")
    assert rows == timeless(tmp_path / "in line")
    assert [row["step"] for row in rows if "val_loss" in row] == [5, 10, 15, 20]
    assert result["stopped"] == "max_steps" and result["val_loss"] == rows[-1]["val_loss"]
    assert weights(tmp_path / "beside") == weights(tmp_path / "in line")
    lines = (tmp_path / "beside" / "events.jsonl").read_text().splitlines()
    told = [event for event in map(json.loads, lines) if event["event"] == "evaluated"]
    assert [event["samples"] for event in told] == [[["once", f"at {n}"]] for n in (5, 10, 15, 20)]


@pytest.mark.parametrize("kill", ["reported {}", "scoring {}"])
def test_killed_run_scores_what_was_pending_and_ends_with_the_same_bits(
    text_file: Path, tiny_data: TokenData, tmp_path: Path, kill: str
) -> None:
    config = falling(text_file, tmp_path)
    beside(config, tiny_data, tmp_path / "whole")
    for step in (5, 10, 20):
        with pytest.raises(Killed):
            beside(config, tiny_data, tmp_path / "killed", kill=kill.format(step))
        assert "val_loss" not in timeless(tmp_path / "killed")[step - 1]
    beside(config, tiny_data, tmp_path / "killed")
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    for name in ("model/model.safetensors", "checkpoint_000020/optimizer.safetensors"):
        assert digest(tmp_path / "killed" / name) == digest(tmp_path / "whole" / name)


def test_early_stop_comes_one_evaluation_later_wherever_the_run_was_killed(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = rising(text_file, tmp_path)
    at_once = in_line(config, tiny_data, tmp_path / "in line")
    last = at_once["step"] + 2
    result = beside(config, tiny_data, tmp_path / "beside")
    assert (result["stopped"], result["step"]) == ("patience", last)
    rows = timeless(tmp_path / "beside")
    assert rows[:-2] == timeless(tmp_path / "in line") and "val_loss" in rows[-1]
    best = min((row["val_loss"], row["step"]) for row in rows if "val_loss" in row)[1]
    assert best < last - 2
    model = checkpoint_folder(tmp_path / "beside", best) / "model" / "model.safetensors"
    assert weights(tmp_path / "beside") == digest(model)
    kept = {folder.name for folder in find_checkpoints(tmp_path / "beside")}
    assert kept == {f"checkpoint_{best:06d}", f"checkpoint_{last:06d}"}
    for kill in (f"reported {last - 2}", f"scoring {last - 2}", f"scoring {last}"):
        with pytest.raises(Killed):
            beside(config, tiny_data, tmp_path / "killed", kill=kill)
    again = beside(config, tiny_data, tmp_path / "killed")
    assert (again["stopped"], again["step"]) == ("patience", last)
    assert timeless(tmp_path / "killed") == rows
    assert weights(tmp_path / "killed") == weights(tmp_path / "beside")


def test_non_finite_score_withdraws_its_checkpoint(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = falling(text_file, tmp_path)
    for _ in range(2):
        scorer = Scorer(config, tiny_data)

        def validated(step: int, scorer: Scorer = scorer) -> Validation:
            validation = scorer.validated(step)
            return Validation(Scores(Score(math.nan, 9, 9)), []) if step == 10 else validation

        result = validate_by(validated, scorer, config, tiny_data, tmp_path)
        assert result["stopped"] == "non_finite"
        assert result["message"] == "step 10: validation loss nan"
        assert newest_intact(tmp_path)[0] == checkpoint_folder(tmp_path, 5)
        model = checkpoint_folder(tmp_path, 5) / "model" / "model.safetensors"
        assert weights(tmp_path) == digest(model)


def test_divergence_while_a_score_is_pending_keeps_the_row_and_no_bad_checkpoint(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = tiny_config(
        text_file,
        tmp_path,
        "optim.lr=1e20",
        "optim.min_lr=1e20",
        "optim.max_grad_norm=null",
        "train.eval_interval=1",
    )
    result = beside(config, tiny_data, tmp_path)
    assert result["stopped"] == "non_finite" and "validation loss" in result["message"]
    assert newest_intact(tmp_path) == (None, [])
    assert not (tmp_path / "model").exists()
