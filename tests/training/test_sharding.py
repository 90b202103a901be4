"""FSDP: the losses of DDP, the same checkpoint folder, runs that change from one to the other."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gptray.config import Config, override
from gptray.data.tokens import TokenData
from gptray.jobs.train.samples import sample_texts
from gptray.model.hf import load_pretrained
from gptray.storage.record import EVENTS, read_rows
from gptray.training.checkpoint import damage
from tests.tiny import tiny_config
from tests.training.runs import Killed, rows, run
from tests.two_workers import two_workers

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Job:
    """A run of two workers; it ends at a step where a kill would end it."""

    folder: str
    config: Config
    kill_at: int | None = None
    # Another job's folder, whose copy it resumes.
    copy_of: str | None = None


def _worker(rank: int, jobs: list[Job], data_dir: Path, root: Path) -> None:
    data = TokenData.open(data_dir)
    for job in jobs:
        if job.copy_of and rank == 0:
            shutil.copytree(root / job.copy_of, root / job.folder)
        dist.barrier()
        with suppress(Killed):
            sample = partial(sample_texts, job.config, data)
            run(job.config, data, root / job.folder, kill_at=job.kill_at, sample=sample)


LLAMA = {
    "model.norm": "rmsnorm", "model.positions": "rotary", "model.mlp": "swiglu",
    "model.n_kv_head": 1, "model.tie_word_embeddings": False, "train.max_steps": 10,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(
        text_file,
        tmp_path_factory.mktemp("storage"),
        "compute.num_workers=2",
        "train.micro_batch_size=2",
        "train.block_size=28",  # of validation, one worker has a batch more than the other
        "model.vocab_size=47",  # of an odd number of rows, some of them padding
    )


@pytest.fixture(scope="module")
def root(config: Config, tiny_data: TokenData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all runs of two workers, which take seconds to start."""
    root = tmp_path_factory.mktemp("runs")
    fsdp = override(config, {"compute.strategy": "fsdp"})
    jobs = [
        Job("ddp", config),
        Job("fsdp", fsdp),
        Job("fsdp-killed", fsdp, kill_at=10),
        Job("resumed", fsdp, copy_of="fsdp-killed"),
        Job("fsdp-to-ddp", config, copy_of="fsdp-killed"),
        Job("ddp-killed", config, kill_at=10),
        Job("ddp-to-fsdp", fsdp, copy_of="ddp-killed"),
        Job("llama-ddp", override(config, LLAMA)),
        Job("llama-fsdp", override(fsdp, LLAMA)),
    ]
    two_workers(_worker, jobs, tiny_data.data_dir, root)
    return root


def test_sharded_workers_of_another_family_have_the_losses_of_ddp(root: Path) -> None:
    ours, theirs = losses(root / "llama-fsdp"), losses(root / "llama-ddp")
    assert len(ours) == 10
    assert ours == pytest.approx(theirs, rel=1e-5)


def losses(run_dir: Path) -> list[float]:
    return [row["train_loss"] for row in rows(run_dir)]


def last(run_dir: Path) -> Path:
    return run_dir / "checkpoint_000020"


def bits(run_dir: Path) -> list[str]:
    files = ("model/model.safetensors", "optimizer.safetensors")
    return [hashlib.sha256((last(run_dir) / name).read_bytes()).hexdigest() for name in files]


def test_sharded_workers_have_the_losses_of_ddp_and_write_the_same_text(root: Path) -> None:
    ours, theirs = rows(root / "fsdp"), rows(root / "ddp")
    assert len(ours) == 20
    for key in ("train_loss", "grad_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], abs=1e-5)
    assert ours[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], abs=1e-5)
    samples = [
        [event["samples"] for event in read_rows(root / name / EVENTS) if "samples" in event]
        for name in ("fsdp", "ddp")
    ]
    assert len(samples[0]) == 2 and samples[0] == samples[1]


def test_their_checkpoint_is_the_same_folder(root: Path) -> None:
    ours, theirs = last(root / "fsdp"), last(root / "ddp")
    assert damage(ours) is None
    names = [
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for folder in (ours, theirs)
    ]
    assert names[0] == names[1]
    moments = [load_file(folder / "optimizer.safetensors") for folder in (ours, theirs)]
    torch.testing.assert_close(moments[0], moments[1], atol=1e-4, rtol=1e-2)


def test_transformers_opens_their_model(root: Path) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        root / "fsdp" / "model", output_loading_info=True, trust_remote_code=False
    )
    theirs, info = loaded
    assert {key: len(problems) for key, problems in info.items() if problems} == {}
    ours = load_pretrained(root / "fsdp").eval()
    idx = torch.arange(20).view(1, 20)
    torch.testing.assert_close(theirs(idx).logits, ours(idx), atol=1e-4, rtol=0)


def test_a_sharded_run_resumes_to_the_same_bits(root: Path) -> None:
    assert bits(root / "resumed") == bits(root / "fsdp")
    assert losses(root / "resumed") == losses(root / "fsdp")


@pytest.mark.parametrize("name", ["fsdp-to-ddp", "ddp-to-fsdp"])
def test_a_run_resumes_under_the_other_strategy(root: Path, name: str) -> None:
    assert losses(root / name) == pytest.approx(losses(root / "ddp"), abs=1e-5)


def test_one_worker_resumes_a_sharded_run(
    root: Path, config: Config, tiny_data: TokenData, tmp_path: Path
) -> None:
    shutil.copytree(root / "fsdp-killed", tmp_path / "one")
    alone = override(config, {"compute.num_workers": 1, "compute.strategy": "fsdp"})
    run(alone, tiny_data, tmp_path / "one")
    assert losses(tmp_path / "one") == pytest.approx(losses(root / "ddp"), abs=1e-5)
