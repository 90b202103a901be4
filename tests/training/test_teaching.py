"""Runs that other models teach: what they learn, and that kills and workers change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from gptray.config import Config, UserError, load_config, override
from gptray.data.tokens import TokenData
from gptray.model.hf import load_pretrained
from gptray.model.shape import weights_sha256
from gptray.storage.record import read_events, teachers_of
from tests.tiny import tiny_config
from tests.training.runs import killed_run, rows, run
from tests.training.test_evaluations import digest, timeless
from tests.two_workers import two_workers


@pytest.fixture(scope="module")
def teachers(
    text_file: Path, tiny_data: TokenData, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Two models of different widths."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, width in (("a", 32), ("b", 16)):
        config = tiny_config(text_file, folder, f"model.n_embd={width}", "train.max_steps=30")
        run(config, tiny_data, folder / name)
    return [folder / name / "model" for name in ("a", "b")]


def taught(text_file: Path, storage: Path, teachers: list[Path], *keys: str) -> Config:
    config = tiny_config(text_file, storage, "model.dropout=0.1", "train.eval_interval=5", *keys)
    return override(config, {"train.teachers": [str(one) for one in teachers]})


def test_a_pupil_of_its_teachers_alone_comes_near_them(
    text_file: Path, tiny_data: TokenData, tmp_path: Path, teachers: list[Path]
) -> None:
    def distance(folder: Path) -> float:
        """Cross-entropy with the average of the teachers, on validation text."""
        idx = torch.from_numpy(tiny_data.val.slice(0, 30 * 32).astype("int64")).view(30, 32)
        with torch.no_grad():
            q = torch.stack([load_pretrained(one).eval()(idx).softmax(-1) for one in teachers])
            logits = load_pretrained(folder).eval()(idx)
        return float(F.cross_entropy(logits.flatten(0, 1), q.mean(0).flatten(0, 1)))

    keys = ("model.dropout=0", "train.eval_interval=20", "optim.lr=0.003")
    run(tiny_config(text_file, tmp_path, *keys), tiny_data, tmp_path / "alone")
    config = taught(text_file, tmp_path, teachers, *keys, "train.teacher_weight=1")
    run(config, tiny_data, tmp_path / "taught")
    assert distance(tmp_path / "taught") < distance(tmp_path / "alone")
    # What is told of training is of the text, and can be compared with validation.
    ours, theirs = rows(tmp_path / "taught"), rows(tmp_path / "alone")
    assert ours[0]["train_loss"] == pytest.approx(theirs[0]["train_loss"], abs=1e-5)
    assert ours[-1]["train_loss"] != theirs[-1]["train_loss"]
    began = teachers_of(read_events(tmp_path / "taught"))
    assert began == {str(one): weights_sha256(one) for one in teachers}


def test_a_taught_run_that_is_killed_ends_with_the_same_bits(
    text_file: Path, tiny_data: TokenData, tmp_path: Path, teachers: list[Path]
) -> None:
    keys = (
        "train.micro_batch_size=4",
        "data.token_replacement=0.1",
        "optim.schedule=wsd",
        "optim.weight_decay=3.2",
        "optim.weight_decay_schedule=rising",
    )
    config = taught(text_file, tmp_path, teachers, *keys)
    run(config, tiny_data, tmp_path / "whole")
    killed_run(config, tiny_data, tmp_path / "killed", at=(5, 15))
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    for name in ("optimizer.safetensors", "model/model.safetensors"):
        ours = tmp_path / "killed" / "checkpoint_000020" / name
        assert digest(ours) == digest(tmp_path / "whole" / "checkpoint_000020" / name)


def _worker(rank: int, config: Config, data_dir: Path, run_dir: Path) -> None:
    run(config, TokenData.open(data_dir), run_dir)


@pytest.mark.slow
def test_two_workers_are_taught_as_one_is(
    text_file: Path, tiny_data: TokenData, tmp_path: Path, teachers: list[Path]
) -> None:
    config = taught(text_file, tmp_path, teachers, "model.dropout=0", "optim.lr=0.003")
    run(config, tiny_data, tmp_path / "one")
    two = override(config, {"compute.num_workers": 2})
    two_workers(_worker, two, tiny_data.data_dir, tmp_path / "two")
    for key in ("train_loss", "grad_norm"):
        assert [row[key] for row in rows(tmp_path / "two")] == pytest.approx(
            [row[key] for row in rows(tmp_path / "one")], rel=1e-3
        )


def test_teachers_of_sharded_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"train.teachers .* with compute.strategy=fsdp"):
        load_config(None, ["train.teachers=[a]", "compute.strategy=fsdp"])
