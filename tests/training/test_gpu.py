"""What only a GPU shows of training: the same bits again, bad steps stopped, memory that ends."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from gptray.config import Config, ModelConfig, override
from gptray.config.values import Precision
from gptray.data.tokenizer import char_tokenizer
from gptray.data.tokens import TokenData
from gptray.evaluation.metrics import scoring_dtype
from gptray.model.gpt import GPT
from gptray.model.loss import linear_cross_entropy
from gptray.training.loop import fit, train_step
from gptray.training.mfu import peak_flops
from gptray.training.run import start
from gptray.training.validation import score_split
from gptray.training.workers import Workers
from tests.data.prepared import prepared_here
from tests.tiny import tiny_config, tiny_text
from tests.training.runs import Killed, rows
from tests.training.runs import run as run_on
from tests.two_workers import two_workers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Of TF32 that is not used, and of what inductor itself uses.
    pytest.mark.filterwarnings("ignore"),
]
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    text = tiny_text()
    folder = tmp_path_factory.mktemp("data")
    return prepared_here(folder, char_tokenizer(text), train=text[:30_000], val=text[30_000:])


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return override(
        tiny_config(Path("unused"), tmp_path),
        {
            "model.n_head": 4,
            "model.n_embd": 128,
            "model.n_positions": 128,
            "model.dropout": 0.1,
            "train.block_size": 128,
            "train.global_batch_size": 16,
            "train.micro_batch_size": 8,
            "train.precision": "bf16",
            "train.compile": False,
        },
    )


run = partial(run_on, device=GPU)


def bits(run_dir: Path, step: int = 20) -> list[str]:
    folder = run_dir / f"checkpoint_{step:06d}"
    files = (folder / "model" / "model.safetensors", folder / "optimizer.safetensors")
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_deterministic_runs_repeat_and_resume_to_the_bit(
    config: Config, data: TokenData, tmp_path: Path, compiled: bool
) -> None:
    exact = override(config, {"train.deterministic": True, "train.compile": compiled})
    run(exact, data, tmp_path / "whole")
    run(exact, data, tmp_path / "again")
    with pytest.raises(Killed):
        run(exact, data, tmp_path / "killed", kill_at=10)
    run(exact, data, tmp_path / "killed")
    assert bits(tmp_path / "whole") == bits(tmp_path / "again") == bits(tmp_path / "killed")
    losses = [[row["train_loss"] for row in rows(tmp_path / n)] for n in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == 20


def test_a_fast_run_learns_as_a_cpu_does(config: Config, data: TokenData, tmp_path: Path) -> None:
    plain = override(config, {"model.dropout": 0.0})
    run(plain, data, tmp_path / "gpu")
    assert not torch.are_deterministic_algorithms_enabled()
    cpu = torch.device("cpu")
    exact = override(plain, {"train.precision": "fp32"})
    fit(exact, data, tmp_path / "cpu", report=lambda *_: None, sample=lambda _: [], device=cpu)
    ours, theirs = (rows(tmp_path / name)[-1] for name in ("gpu", "cpu"))
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=0.05)
    assert ("mfu" in ours) == (peak_flops(torch.cuda.get_device_name(GPU)) is not None)
    assert 0 <= ours.get("mfu", 0) < 1 and "mfu" not in theirs


def test_in_a_step_the_host_waits_for_nothing(
    config: Config, data: TokenData, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    one = start(config, data, run_dir, workers=Workers(0, 1), device=GPU)
    train_step(one).read()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps = [train_step(one) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [step.step for step in steps] == [2, 3, 4]
    assert all(math.isfinite(number) for step in steps for number in step.read())


def test_a_non_finite_step_stops_the_run_before_any_checkpoint(
    config: Config, data: TokenData, tmp_path: Path
) -> None:
    high = {"optim.lr": 1e20, "optim.min_lr": 1e20, "optim.max_grad_norm": None}
    diverging = override(config, {**high, "train.log_interval": 10})
    result = run(diverging, data, tmp_path)
    assert result["stopped"] == "non_finite" and "step" in result["message"]
    assert not list(tmp_path.glob("checkpoint_*"))


def test_too_little_memory_ends_in_one_sentence(
    config: Config, data: TokenData, tmp_path: Path
) -> None:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction(64 * 2**20 / total, GPU)
    try:
        wide = {"model.n_embd": 512, "train.global_batch_size": 64, "train.micro_batch_size": 64}
        result = run(override(config, wide), data, tmp_path)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    assert result["stopped"] == "failed" and not result["mistake"]
    assert "lower train.micro_batch_size from 64" in result["message"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_head_equals_pytorchs(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 64, generator=generator).mul_(0.1).to(GPU).requires_grad_()
    x = torch.randn(500, 64, generator=generator).to(GPU, dtype).requires_grad_()
    targets = torch.randint(1000, (500,), generator=generator).to(GPU)
    logits = F.linear(x.float(), weight.to(dtype).float())[:, :1000]
    theirs = F.cross_entropy(logits, targets)
    expected = torch.autograd.grad(theirs, (x, weight))
    for head in (linear_cross_entropy, torch.compile(linear_cross_entropy)):
        ours = head(x, weight, targets, valid=1000)
        found = torch.autograd.grad(ours, (x, weight))
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5 if dtype.itemsize > 2 else 2e-3)
        for one, other in zip(found, expected, strict=True):
            error = (one.float() - other.float()).norm() / other.float().norm()
            assert error < (1e-4 if dtype.itemsize > 2 else 2e-2)


def test_evaluation_computes_in_bf16_and_says_the_same(data: TokenData) -> None:
    model = GPT(ModelConfig(n_layer=2, n_head=4, n_embd=64, n_positions=64), vocab_size=100)
    model.initialise(3)
    score: dict[str, float] = {}
    kinds: tuple[tuple[str, torch.device, Precision], ...] = (
        ("cpu", torch.device("cpu"), "auto"),
        ("auto", GPU, "auto"),
        ("fp32", GPU, "fp32"),
    )
    for name, device, precision in kinds:
        model.compute_dtype = scoring_dtype(precision, device)
        assert (model.compute_dtype == torch.bfloat16) == (name == "auto")
        found = score_split(
            model.to(device), data.val, block_size=64, batch_size=16, workers=Workers(0, 1)
        )
        score[name] = found.loss
    assert score["fp32"] == pytest.approx(score["cpu"], abs=1e-5)
    assert score["auto"] == pytest.approx(score["cpu"], abs=5e-3) and math.isfinite(score["auto"])


def test_blocks_computed_again_end_with_the_same_bits_in_less_memory(
    config: Config, data: TokenData, tmp_path: Path
) -> None:
    exact = override(config, {"train.deterministic": True, "model.n_layer": 8})
    peaks = []
    for name, recomputes in (("kept", False), ("again", True)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(GPU)
        run(override(exact, {"model.checkpoint_blocks": recomputes}), data, tmp_path / name)
        peaks.append(torch.cuda.max_memory_allocated(GPU))
    assert bits(tmp_path / "kept") == bits(tmp_path / "again")
    assert peaks[1] < peaks[0]


def _worker(rank: int, configs: dict[Path, Config], data_dir: Path) -> None:
    for run_dir, config in configs.items():
        run_on(config, TokenData.open(data_dir), run_dir, device=torch.device("cuda", rank))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_sharded_gpus_have_the_losses_of_ddp(
    config: Config, data: TokenData, tmp_path: Path, compiled: bool
) -> None:
    two = override(
        config,
        {"compute.num_workers": 2, "train.precision": "fp32", "train.compile": compiled},
    )
    fsdp = override(two, {"compute.strategy": "fsdp"})
    configs = {tmp_path / "ddp": two, tmp_path / "fsdp": fsdp}
    two_workers(_worker, configs, data.data_dir, backend="nccl")
    losses = [[row["train_loss"] for row in rows(tmp_path / n)] for n in ("fsdp", "ddp")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 20
