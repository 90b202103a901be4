"""What a dry run says of workers and their memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptray.config import load_config
from gptray.jobs.train.check import check, plan

GPT2_124M = (
    "model.n_layer=12",
    "model.n_head=12",
    "model.n_embd=768",
    "model.n_positions=1024",
    "model.vocab_size=50304",
    "compute.num_workers=2",
)
SMALL = "train.global_batch_size=2"


def planned(storage: Path, *words: str) -> dict[str, str]:
    config = load_config(None, [f"storage_path={storage}", *GPT2_124M, *words])
    return dict(plan(check(config)))


def memory(rows: dict[str, str]) -> float:
    return float(rows["memory per worker"].removeprefix("about ").removesuffix(" GiB"))


def test_sharded_workers_are_told_of_and_need_less_memory(tmp_path: Path) -> None:
    whole, sharded = planned(tmp_path, SMALL), planned(tmp_path, SMALL, "compute.strategy=fsdp")
    assert whole["workers"] == "2 (CPU)"
    assert sharded["workers"] == "2 (CPU), each with its share of the weights (fsdp)"
    # 16 bytes a parameter, or half of that and the embedding with its gradient for a while.
    assert memory(whole) == pytest.approx(124.5e6 * 16 / 2**30, abs=0.2)
    assert memory(sharded) == pytest.approx(124.5e6 * 8 / 2**30 + 0.3, abs=0.2)


def test_recomputed_blocks_need_less_memory(tmp_path: Path) -> None:
    long = ("train.block_size=1024", "train.global_batch_size=8")
    kept = planned(tmp_path, *long)
    recomputed = planned(tmp_path, *long, "model.checkpoint_blocks=true")
    assert memory(recomputed) < memory(kept) / 2
