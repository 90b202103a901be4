"""Gradients on their way between workers, in fp32 or bf16; and blocks that are computed again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptray.config import Config
from gptray.data.tokens import TokenData
from tests.tiny import tiny_config
from tests.training.runs import rows, run
from tests.two_workers import two_workers

pytestmark = pytest.mark.slow
# A model whose smallest bucket of gradients has more values than any other sum over workers.
LEAST = 100


class Wire(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the types of what this process adds up with the other."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.types: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func.namespace == "c10d" and "reduce" in func.name():
            sent = [one for one in tree_leaves(args) if isinstance(one, Tensor)]
            self.types |= {str(one.dtype) for one in sent if one.numel() > LEAST}
        return func(*args, **(kwargs or {}))


def _worker(rank: int, configs: dict[str, Config], data_dir: Path, root: Path) -> None:
    sent = {}
    for name, config in configs.items():
        with Wire() as wire:
            run(config, TokenData.open(data_dir), root / name)
        sent[name] = sorted(wire.types)
    if rank == 0:
        (root / "sent.json").write_text(json.dumps(sent))


@pytest.fixture(scope="module")
def root(text_file: Path, tiny_data: TokenData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of runs by the same two workers, which take seconds to start."""
    root = tmp_path_factory.mktemp("reduced")
    configs = {
        "fp32": [],
        "bf16": ["compute.reduce_dtype=bf16"],
        "bf16-fsdp": ["compute.reduce_dtype=bf16", "compute.strategy=fsdp"],
        "again": ["model.checkpoint_blocks=true", "model.dropout=0.1"],
        "kept": ["model.dropout=0.1"],
    }
    usual = ("compute.num_workers=2", "train.micro_batch_size=2", "train.max_steps=10")
    made = {name: tiny_config(text_file, root, *usual, *own) for name, own in configs.items()}
    two_workers(_worker, made, tiny_data.data_dir, root)
    return root


def losses(run_dir: Path) -> list[float]:
    return [row["train_loss"] for row in rows(run_dir)]


def test_gradients_go_as_the_type_that_was_asked_for(root: Path) -> None:
    assert json.loads((root / "sent.json").read_text()) == {
        "fp32": ["torch.float32"],
        "bf16": ["torch.bfloat16"],
        "bf16-fsdp": ["torch.bfloat16"],
        "again": ["torch.float32"],
        "kept": ["torch.float32"],
    }


@pytest.mark.parametrize("name", ["bf16", "bf16-fsdp"])
def test_rounded_gradients_change_losses_a_little(root: Path, name: str) -> None:
    assert losses(root / name) == pytest.approx(losses(root / "fp32"), abs=1e-2)
    assert losses(root / name) != losses(root / "fp32")


def test_blocks_computed_again_have_the_same_losses_and_dropout(root: Path) -> None:
    assert losses(root / "again") == losses(root / "kept")
