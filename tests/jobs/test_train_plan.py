"""What a dry run says of workers and their memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptray.config import UserError, load_config
from gptray.jobs.train.check import check, plan
from gptray.training.optim import learning_rate
from tests.generation.models import small_tokenizer
from tests.model.foreign_models import make_hf

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


def test_the_peak_rate_is_the_highest_that_the_training_reaches(tmp_path: Path) -> None:
    short = ("train.max_steps=9", "optim.lr=1e-2", SMALL)
    reached = planned(tmp_path, *short, "optim.warmup_steps=8")
    assert reached["peak learning rate"] == "0.01"
    config = load_config(None, [*short[:2], "optim.warmup_steps=99"])
    assert learning_rate(8, 9, config.optim) == pytest.approx(9e-4)
    rows = planned(tmp_path, *short, "optim.warmup_steps=99")
    told = "0.0009: training ends in its warm-up of 99 steps"
    assert rows["peak learning rate"] == told
    assert rows["micro-batch"] == "1 x 1 pass a worker"


def test_recomputed_blocks_need_less_memory(tmp_path: Path) -> None:
    long = ("train.block_size=1024", "train.global_batch_size=8")
    kept = planned(tmp_path, *long)
    recomputed = planned(tmp_path, *long, "model.checkpoint_blocks=true")
    assert memory(recomputed) < memory(kept) / 2


def test_a_base_in_few_bits_needs_less_memory(tmp_path: Path) -> None:
    base = make_hf("llama", 300)
    base.save_pretrained(tmp_path / "base")
    small_tokenizer().save(tmp_path / "base")
    words = [f"storage_path={tmp_path}", f"model.init_from={tmp_path / 'base'}", "lora.rank=2"]
    config = load_config(None, [*words, "quantize.weights=int8", "train.block_size=16"])
    rows = dict(plan(check(config)))
    assert "GiB with an unquantized base" in rows["memory per worker"]
    assert rows["peak learning rate"] == "0.021"  # chosen by the base's width, 48
    assert rows["shared memory"].endswith(": all processes of a machine hold it once")


def test_weights_in_few_bits_are_not_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quantize\.weights=int8: .*set lora\.rank"):
        planned(tmp_path, SMALL, "quantize.weights=int8")


def test_a_stop_token_that_the_tokenizer_lacks_is_told_before_anything_starts(
    tmp_path: Path,
) -> None:
    small_tokenizer().save(tmp_path / "tokenizer")
    words = [f"storage_path={tmp_path}", f"data.tokenizer={tmp_path}/tokenizer"]
    check(load_config(None, [*words, "sample.stop_token_ids=[5, 282]"]))
    with pytest.raises(UserError, match=r"sample.stop_token_ids: 999 is outside .*, 0 .. 28\d$"):
        check(load_config(None, [*words, "sample.stop_token_ids=[5, 999]"]))
