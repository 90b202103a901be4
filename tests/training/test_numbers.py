"""A step's numbers read late, as on a GPU, tell the same and never let a bad step through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptray.config import Config, override
from gptray.data.tokenizer import char_tokenizer
from gptray.data.tokens import TokenData
from gptray.storage.record import EVENTS, read_rows
from gptray.training.evaluations import BlockingEvaluation
from gptray.training.journal import Journal
from gptray.training.loop import train
from gptray.training.mfu import flops_per_token, peak_flops, tokens_per_sec_at_peak
from gptray.training.numbers import Action
from gptray.training.run import Run, start
from gptray.training.stopping import NonFiniteLoss
from gptray.training.workers import Workers
from tests.data.prepared import prepared_here
from tests.tiny import tiny_config, tiny_text


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    text = tiny_text(300)
    folder = tmp_path_factory.mktemp("data")
    return prepared_here(folder, char_tokenizer(text), train=text[:8000], val=text[8000:])


def started(config: Config, data: TokenData, run_dir: Path, *, late: bool) -> Run:
    run_dir.mkdir()
    run = start(config, data, run_dir, workers=Workers(0, 1), device=torch.device("cpu"))
    run.lag = int(late)
    return run


def trained(run: Run) -> Any:
    with Journal(run.run_dir, step=0) as run.journal:
        evaluations = BlockingEvaluation(run, lambda *_: None, lambda model: [])
        return train(run, evaluations, lambda: Action.NONE)


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key != "tokens_per_sec"} for row in rows]


@pytest.mark.parametrize("log_interval", [1, 3])
def test_numbers_read_late_make_the_same_rows_and_weights(
    data: TokenData, tmp_path: Path, log_interval: int
) -> None:
    config = tiny_config(
        Path("unused"), tmp_path, "train.max_steps=8", f"train.log_interval={log_interval}"
    )
    runs = [started(config, data, tmp_path / str(late), late=late) for late in (False, True)]
    for run in runs:
        assert trained(run)["stopped"] == "max_steps"
    assert timeless(tmp_path / "False") == timeless(tmp_path / "True")
    for ours, theirs in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_non_finite_step_read_late_has_updated_nothing(data: TokenData, tmp_path: Path) -> None:
    config = tiny_config(
        Path("unused"),
        tmp_path,
        "optim.lr=1e20",
        "optim.min_lr=1e20",
        "optim.max_grad_norm=null",
        "train.log_interval=10",
    )
    messages, runs = [], []
    for late in (False, True):
        run = started(config, data, tmp_path / str(late), late=late)
        with pytest.raises(NonFiniteLoss) as caught:
            trained(run)
        messages.append(str(caught.value))
        runs.append(run)
    assert messages[0] == messages[1] and "nan" in messages[0]
    assert runs[0].state == runs[1].state and runs[0].state.step > 0
    for ours, theirs in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_start_says_how_steps_are_computed(data: TokenData, tmp_path: Path) -> None:
    started(tiny_config(Path("unused"), tmp_path), data, tmp_path / "run", late=False)
    (start_event,) = read_rows(tmp_path / "run" / EVENTS)
    assert start_event["event"] == "start"
    # On a CPU nothing is compiled unless told, and bits always repeat.
    assert start_event["compiled"] is False and start_event["deterministic"] is True


def test_mfu_is_palms() -> None:
    config = override(
        Config(),
        {
            "model.n_layer": 12,
            "model.n_embd": 768,
            "model.n_head": 12,
            "model.n_positions": 1024,
            "train.block_size": 1024,
        },
    )
    # 6 N + 12 L H Q T of GPT-2 small, N without the position embeddings.
    per_token = 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert flops_per_token(config, 124_439_808) == per_token
    adapted = override(config, {"lora.rank": 8, "model.init_from": "gpt2"})
    frozen = per_token - 2 * (124_439_808 - 1024 * 768)  # no gradients of the weights
    assert flops_per_token(adapted, 124_439_808) == frozen
    name, bf16 = "NVIDIA H100 80GB HBM3", torch.bfloat16
    size = 124_439_808
    for workers in (1, 4):
        at_peak = tokens_per_sec_at_peak(config, size, bf16, name, workers=workers)
        assert at_peak == workers * 989e12 / per_token
    assert tokens_per_sec_at_peak(config, size, torch.float32, name, workers=1) is None
    shared = override(config, {"compute.gpus_per_worker": 0.5})
    assert tokens_per_sec_at_peak(shared, size, bf16, name, workers=1) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("Tesla T4", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("x86_64 processor, 2 threads", None),
    ],
)
def test_peaks_go_by_the_name_of_the_card(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
