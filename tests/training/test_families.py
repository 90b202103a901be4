"""Every family trains from a folder of transformers', resumes to the bit, and opens there again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptray.config import Config, UserError, load_config, override
from gptray.data.tokens import TokenData
from gptray.jobs.folders.run_folder import resolve
from gptray.model.hf import load_pretrained
from gptray.storage.files import sha256_of
from gptray.storage.record import last_event, read_events
from tests.generation.models import needs_native
from tests.model.foreign_models import FAMILIES, make_hf
from tests.training.runs import Killed, rows, run


def config_from(name: str, data: TokenData, folder: Path, *words: str) -> Config:
    """A run of four steps from a model whose embedding is padded, as Qwen's and GPT-NeoX's are."""
    theirs = make_hf(name, data.vocab_size + 5, initializer_range=0.05)
    theirs.save_pretrained(folder / "theirs")
    data.tokenizer.save(folder / "theirs")
    settings = [
        f"storage_path={folder}", "name=run", f"model.init_from={folder / 'theirs'}",
        "train.max_steps=4", "train.eval_interval=2", "train.log_interval=1",
        "train.global_batch_size=4", "train.block_size=32", "train.precision=fp32",
        "optim.lr=0.01", "optim.warmup_steps=0",
    ]  # fmt: skip
    values = dict(pair.split("=", 1) for pair in [*settings, *words])
    return resolve(load_config(None, [f"{key}={value}" for key, value in values.items()]))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_learns_resumes_to_the_same_bits_and_opens_in_transformers(
    name: str, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = config_from(name, tiny_data, tmp_path)
    run(config, tiny_data, tmp_path / "whole")
    with pytest.raises(Killed):
        run(config, tiny_data, tmp_path / "cut", kill_at=2)
    run(config, tiny_data, tmp_path / "cut")
    weights = [tmp_path / folder / "model" / "model.safetensors" for folder in ("whole", "cut")]
    assert sha256_of(weights[0]) == sha256_of(weights[1])
    losses = [row["val_loss"] for row in rows(tmp_path / "cut") if "val_loss" in row]
    assert losses[0] > losses[-1]
    before, whole = (last_event(read_events(tmp_path / one), "base") for one in ("cut", "whole"))
    assert before and whole and before["val_loss"] == whole["val_loss"] > losses[0]

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "cut" / "model", output_loading_info=True, trust_remote_code=False
    )
    theirs, info = loaded
    assert {key: len(problems) for key, problems in info.items() if problems} == {}
    assert theirs.config.model_type == name
    assert theirs.config.vocab_size == tiny_data.vocab_size
    idx = torch.tensor([tiny_data.tokenizer.encode("the cat sees the river.")])
    with torch.no_grad():
        ours = load_pretrained(tmp_path / "cut").eval()(idx)
        torch.testing.assert_close(ours, theirs(idx).logits, atol=1e-4, rtol=0)


def test_a_shorter_context_than_a_rotary_models_is_no_contradiction(
    tiny_data: TokenData, tmp_path: Path
) -> None:
    words = ("model.n_positions=40", "model.dropout=0.2")
    config = config_from("qwen3", tiny_data, tmp_path, *words)
    assert (config.model.n_positions, config.model.dropout) == (40, 0.2)
    for key in ("model.n_positions=97", "model.rope_theta=5", "model.qk_norm=false"):
        with pytest.raises(UserError, match=key):
            config_from("qwen3", tiny_data, tmp_path, key)


@needs_native
@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_train_every_family_as_pytorch_does(
    name: str, tiny_data: TokenData, tmp_path: Path
) -> None:
    losses = {}
    for backend in ("native", "torch"):
        words = ("train.precision=bf16", f"train.backend={backend}")
        run(config_from(name, tiny_data, tmp_path, *words), tiny_data, tmp_path / backend)
        [start] = [one for one in read_events(tmp_path / backend) if one["event"] == "start"]
        assert start["backend"] == backend
        losses[backend] = [row["train_loss"] for row in rows(tmp_path / backend)]
    assert losses["native"] == pytest.approx(losses["torch"], abs=0.02)


@needs_native
def test_kernels_resume_to_the_same_bits_with_blocks_computed_again(
    tiny_data: TokenData, tmp_path: Path
) -> None:
    words = ("train.precision=bf16", "train.backend=native")
    config = config_from("qwen3", tiny_data, tmp_path, *words)
    run(config, tiny_data, tmp_path / "whole")
    config = override(config, {"model.checkpoint_blocks": True})
    with pytest.raises(Killed):
        run(config, tiny_data, tmp_path / "cut", kill_at=2)
    run(config, tiny_data, tmp_path / "cut")
    weights = [tmp_path / folder / "model" / "model.safetensors" for folder in ("whole", "cut")]
    assert sha256_of(weights[0]) == sha256_of(weights[1])
