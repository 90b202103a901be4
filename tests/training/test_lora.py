"""Training an adapter: what learns, what a checkpoint holds, what is published, and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gptray.config import Config, UserError, load_config
from gptray.config.schema import differences
from gptray.data.tokens import TokenData
from gptray.jobs.folders.run_folder import resolve
from gptray.model.adapter_files import load_adapted
from gptray.model.hf import load_pretrained
from gptray.storage.files import sha256_of
from gptray.storage.record import read_events
from gptray.training.validation import score_checkpoint
from tests.generation.models import needs_native
from tests.model.foreign_models import make_hf
from tests.model.test_lora import opened_by_peft
from tests.training.runs import CPU, Killed, killed_run, rows, run
from tests.training.test_evaluations import digest, timeless

# PEFT's.
pytestmark = pytest.mark.filterwarnings("ignore")


def config_in(folder: Path, data: TokenData, *words: str, family: str = "gpt2") -> Config:
    """A run of six steps from a model whose embedding is padded."""
    if not (folder / "base").exists():
        theirs = make_hf(family, data.vocab_size + 5, initializer_range=0.05)
        theirs.save_pretrained(folder / "base")
        data.tokenizer.save(folder / "base")
    settings = [
        f"storage_path={folder}", "name=run", f"model.init_from={folder / 'base'}", "lora.rank=2",
        "lora.dropout=0.1", "model.dropout=0.1", "train.max_steps=6", "train.eval_interval=2",
        "train.log_interval=1", "train.global_batch_size=4", "train.block_size=32",
        "train.precision=fp32", "optim.warmup_steps=0",
    ]  # fmt: skip
    values = dict(pair.split("=", 1) for pair in [*settings, *words])
    return resolve(load_config(None, [f"{key}={value}" for key, value in values.items()]))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        answer = model.eval()(torch.arange(16).view(1, 16))
    whole: torch.Tensor = getattr(answer, "logits", answer)
    return whole


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "phi3", "gemma3_text"])
def test_a_run_leaves_an_adapter_and_the_merged_model(
    family: str, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = config_in(tmp_path, tiny_data, family=family)
    before = sha256_of(tmp_path / "base" / "model.safetensors")
    run(config, tiny_data, tmp_path / "run")
    assert sha256_of(tmp_path / "base" / "model.safetensors") == before
    losses = [row["val_loss"] for row in rows(tmp_path / "run") if "val_loss" in row]
    assert losses[-1] < losses[0] - 0.01
    checkpoint = tmp_path / "run" / "checkpoint_000006"
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {
        "adapter", "config.yaml", "manifest.json", "optimizer.safetensors", "trainer.json",
    }  # fmt: skip
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        assert all(".lora_" in name for name in file.keys())  # noqa: SIM118 - not a mapping
    (start,) = [event for event in read_events(tmp_path / "run") if event["event"] == "start"]
    assert 0 < start["trained"] < start["parameters"] / 3
    theirs = opened_by_peft(tmp_path / "base", tmp_path / "run" / "adapter")
    merged = logits(load_pretrained(tmp_path / "run"))
    assert merged.size(-1) == tiny_data.vocab_size  # as a model that was trained whole
    expected = logits(theirs)[..., : tiny_data.vocab_size]
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("words", [
    ["quantize.weights=none"],
    ["quantize.weights=int4"],
    pytest.param(["train.precision=bf16", "train.backend=native"], marks=needs_native),
])  # fmt: skip
def test_a_killed_run_ends_with_the_same_bits(
    words: list[str], tiny_data: TokenData, tmp_path: Path
) -> None:
    config = config_in(tmp_path, tiny_data, *words)
    run(config, tiny_data, tmp_path / "whole")
    killed_run(config, tiny_data, tmp_path / "killed", at=(2, 4))
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    last = "checkpoint_000006"
    for name in (
        f"{last}/adapter/adapter_model.safetensors", f"{last}/optimizer.safetensors",
        "model/model.safetensors", "adapter/adapter_model.safetensors",
    ):  # fmt: skip
        assert digest(tmp_path / "killed" / name) == digest(tmp_path / "whole" / name)
    scores, _ = score_checkpoint(config, tiny_data, tmp_path / "whole" / last, CPU,
                                 run_dir=tmp_path / "whole")  # fmt: skip
    assert scores.own.loss == rows(tmp_path / "whole")[-1]["val_loss"]


def test_an_adapter_of_a_quantized_base_is_merged_with_that(
    tiny_data: TokenData, tmp_path: Path
) -> None:
    config = config_in(tmp_path, tiny_data, "quantize.weights=int8", family="llama")
    run(config, tiny_data, tmp_path / "run")
    losses = [row["val_loss"] for row in rows(tmp_path / "run") if "val_loss" in row]
    assert losses[-1] < losses[0] - 0.01
    both = load_adapted(tmp_path / "base", tmp_path / "run" / "adapter")
    expected = logits(both)[..., : tiny_data.vocab_size]
    assert torch.equal(logits(load_pretrained(tmp_path / "run")), expected)
    # Its own run has another name than that of the same adapter beside full weights.
    full, int8 = (
        config_in(tmp_path, tiny_data, "name=null", f"quantize.weights={kind}").name
        for kind in ("none", "int8")
    )
    assert full != int8


def test_a_run_lands_from_its_best_adapter(tiny_data: TokenData, tmp_path: Path) -> None:
    config = config_in(tmp_path, tiny_data, "optim.schedule=wsd", "optim.decay_fraction=0.5")
    assert run(config, tiny_data, tmp_path / "run")["step"] == 6
    assert [row["phase"] for row in rows(tmp_path / "run")] == ["stable"] * 4 + ["landing"] * 2


@needs_native
def test_a_killed_landing_ends_with_the_same_bits(tiny_data: TokenData, tmp_path: Path) -> None:
    words = ("optim.schedule=wsd", "optim.decay_fraction=0.5", "optim.lr=0.02")
    native = ("train.precision=bf16", "train.backend=native", "train.eval_interval=1")
    config = config_in(tmp_path, tiny_data, *words, *native)
    run(config, tiny_data, tmp_path / "whole")
    with pytest.raises(Killed):
        run(config, tiny_data, tmp_path / "killed", kill_at=5)  # the first step of the landing
    run(config, tiny_data, tmp_path / "killed")
    weights = [tmp_path / one / "checkpoint_000006" / "adapter" for one in ("whole", "killed")]
    digests = [digest(folder / "adapter_model.safetensors") for folder in weights]
    assert digests[0] == digests[1]


def test_another_base_is_refused_when_a_run_resumes(tiny_data: TokenData, tmp_path: Path) -> None:
    config = config_in(tmp_path, tiny_data)
    with pytest.raises(Killed):
        run(config, tiny_data, tmp_path / "run", kill_at=2)
    theirs = make_hf("gpt2", tiny_data.vocab_size + 5, initializer_range=0.06)
    theirs.save_pretrained(tmp_path / "base")
    result = run(config, tiny_data, tmp_path / "run")
    assert result["stopped"] == "failed" and result["mistake"]
    assert f"was trained on another model than {tmp_path / 'base'}" in result["message"]


def test_weights_that_are_trained_as_a_whole_are_the_adapters(
    tiny_data: TokenData, tmp_path: Path
) -> None:
    config = config_in(tmp_path, tiny_data, "lora.train=[norms, embeddings]")
    run(config, tiny_data, tmp_path / "run")
    theirs = opened_by_peft(tmp_path / "base", tmp_path / "run" / "adapter")
    expected = logits(theirs)[..., : tiny_data.vocab_size]
    torch.testing.assert_close(
        logits(load_pretrained(tmp_path / "run")), expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(("rank", "lr"), [("null", 0.1 / 48), ("2", 1 / 48)])
def test_the_learning_rate_follows_from_the_models_width_unless_given(
    rank: str, lr: float, tiny_data: TokenData, tmp_path: Path
) -> None:
    config = config_in(tmp_path, tiny_data, f"lora.rank={rank}")
    assert config.model.n_embd == 48
    assert config.optim.lr == pytest.approx(lr, rel=0.02)
    assert config.optim.final_lr == pytest.approx(lr / 10, rel=0.02)
    assert resolve(config).optim == config.optim
    for given in (2e-3, 1e-5):  # the default of a new model, and less than a tenth of that
        again = config_in(tmp_path, tiny_data, f"lora.rank={rank}", f"optim.lr={given}")
        assert again.optim.lr == given
        assert again.optim.final_lr == pytest.approx(given / 10)
        assert differences(again)["optim.lr"] == given


def test_the_least_rate_is_compared_with_the_rate_that_follows(
    tiny_data: TokenData, tmp_path: Path
) -> None:
    # Above the default of a new model, and below an adapter's.
    assert config_in(tmp_path, tiny_data, "optim.min_lr=0.01").optim.final_lr == 0.01
    with pytest.raises(UserError, match="optim.min_lr=0.01 must not be above optim.lr=0.0021"):
        config_in(tmp_path, tiny_data, "lora.rank=null", "optim.min_lr=0.01")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("model.init_from=null", "lora.rank needs model.init_from, the model to adapt"),
        ("train.ema=0.9", "lora.rank cannot be combined with train.ema"),
        ("compute.strategy=fsdp", "lora.rank cannot be combined with compute.strategy=fsdp"),
        ("model.resize_vocab=true", "lora.rank cannot be combined with model.resize_vocab=true"),
    ],
)
def test_what_an_adapter_does_not_go_with_is_refused(word: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(None, ["lora.rank=2", "model.init_from=somewhere", word])
