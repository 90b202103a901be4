"""Workers' network: what they send at the start, and when they reduce their gradients."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from gptray.config import Config
from gptray.data.tokens import TokenData
from gptray.training.run import start
from gptray.training.workers import Workers
from tests.tiny import tiny_config
from tests.two_workers import two_workers


def compiled_parts(loss: Tensor) -> list[Node]:
    """The compiled backward passes of a loss, in the order in which they run."""
    nodes = [loss.grad_fn]
    for node in nodes:
        for before, _ in node.next_functions if node else ():
            if before not in nodes:
                nodes.append(before)
    return [node for node in nodes if node and node.name().startswith("CompiledFunction")]


def _worker(rank: int, config: Config, data_dir: Path, run_dir: Path) -> None:
    device, data = torch.device("cpu"), TokenData.open(data_dir)
    run = start(config, data, run_dir, workers=Workers.current(), device=device)
    happened: list[str] = []

    def reduce(state: object, bucket) -> torch.futures.Future[Tensor]:  # type: ignore[no-untyped-def]
        happened.append("reduced")
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    assert isinstance(run.loss_model, DistributedDataParallel)
    reduce.__annotations__.clear()  # which DDP would read
    run.loss_model.register_comm_hook(None, reduce)
    for _ in range(2):  # from the second step on, buckets are in the order of the gradients
        happened.clear()
        loss = run.loss_model(*run.batch.micro_batch(0, device))
        last = compiled_parts(loss)[-1]
        last.register_prehook(lambda grads: happened.append("last part"))
        loss.backward()
    if rank == 0:
        (run_dir / "happened.json").write_text(json.dumps(happened))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_reduces_the_last_blocks_before_the_first_has_its_gradient(
    text_file: Path, tiny_data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # of each of the two processes
    # A block larger than DDP's first bucket of 1 MiB.
    words = ("compute.num_workers=2", "train.compile=true", "model.n_embd=192")
    config = tiny_config(text_file, tmp_path, *words)
    (tmp_path / "run").mkdir()
    two_workers(_worker, config, tiny_data.data_dir, tmp_path / "run")
    happened = json.loads((tmp_path / "run" / "happened.json").read_text())
    assert happened.index("reduced") < happened.index("last part")


class Shifted(nn.Module):
    """A weight, and a buffer that is this worker's own at first."""

    shift: Tensor

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), float(rank)))
        self.register_buffer("shift", torch.full((3,), float(rank)))

    def forward(self) -> Tensor:
        return (self.weight + self.shift).sum()


def _send_buffers(rank: int, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = Shifted(rank)
        model = Workers.current().parallel(own, "fp32")
    at_first = model().item()
    own.shift.fill_(rank)
    if rank == 1:
        (folder / "sums.json").write_text(json.dumps([at_first, model().item()]))
    else:
        model()


@pytest.mark.slow
def test_workers_are_sent_weights_and_buffers_at_the_start_and_never_again(tmp_path: Path) -> None:
    two_workers(_send_buffers, tmp_path)
    assert json.loads((tmp_path / "sums.json").read_text()) == [0.0, 3.0]
