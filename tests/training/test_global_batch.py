"""A step's loss is the mean over the targets of its global batch that count, as validation's is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from gptray.config import Config
from gptray.data.order import BatchOrder
from gptray.data.tokens import TokenData
from gptray.training.building import build_model
from tests.tiny import tiny_config
from tests.training.runs import CPU, rows, run
from tests.two_workers import two_workers

STEPS = ("train.max_steps=2", "train.eval_interval=2")


@pytest.fixture
def data(tiny_data: TokenData) -> TokenData:
    """Each line begins with a prefix, as a document does with <s>."""
    return lines_of(tiny_data.data_dir)


def lines_of(folder: Path) -> TokenData:
    data = TokenData.open(folder)
    (newline,) = data.tokenizer.encode("\n")
    for split in data.splits.values():
        split.document_prefix = [newline]
    return data


def first_loss(config: Config, data: TokenData) -> float:
    """Of the first step, before it, without pieces or parts."""
    model = build_model(config, data, None, CPU, native=False)
    starts = BatchOrder(data.train.tokens, 32, seed=config.seed).batch(0, 8)
    windows = np.stack([data.train.slice(start, start + 33) for start in starts.tolist()])
    counts = torch.from_numpy(data.train.counts(windows[:, 1:]))
    tokens = torch.from_numpy(windows)
    assert len(set(counts.sum(1).tolist())) > 1
    with torch.no_grad():
        return float(F.cross_entropy(model(tokens[:, :-1])[counts], tokens[:, 1:][counts]))


@pytest.mark.parametrize("size", [1, 4, 8])
def test_what_begins_a_document_counts_in_no_micro_batch(
    text_file: Path, data: TokenData, tmp_path: Path, size: int
) -> None:
    config = tiny_config(text_file, tmp_path, *STEPS, f"train.micro_batch_size={size}")
    run(config, data, tmp_path / "run")
    assert rows(tmp_path / "run")[0]["train_loss"] == pytest.approx(first_loss(config, data))
    whole = tiny_config(text_file, tmp_path, *STEPS)
    run(whole, data, tmp_path / "whole")
    ours, theirs = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole")
    )
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-4, rtol=1e-4)


def _worker(rank: int, config: Config, data_dir: Path, folder: Path) -> None:
    run(config, lines_of(data_dir), folder)


@pytest.mark.slow
def test_it_counts_in_no_worker_either(text_file: Path, data: TokenData, tmp_path: Path) -> None:
    keys = ("compute.num_workers=2", "train.micro_batch_size=1")
    config = tiny_config(text_file, tmp_path, *STEPS, *keys)
    two_workers(_worker, config, data.data_dir, tmp_path / "run")
    assert rows(tmp_path / "run")[0]["train_loss"] == pytest.approx(first_loss(config, data))
