"""Runs without Ray that end where a kill would end them, and the rows that they leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gptray.config import Config
from gptray.data.tokens import TokenData
from gptray.jobs.train.samples import sample_texts
from gptray.model.gpt import GPT
from gptray.training.evaluations import Samples
from gptray.training.loop import fit

CPU = torch.device("cpu")


class Killed(BaseException):
    """Ends a run where a kill would."""


def run(
    config: Config,
    data: TokenData,
    run_dir: Path,
    *,
    kill_at: int | None = None,
    device: torch.device = CPU,
    sample: Callable[[GPT], Samples] | None = None,
    fetch: Callable[[Path], None] = lambda checkpoint: None,
) -> Any:
    """Train as a worker does, with samples, until the step at which it is killed."""

    def report(metrics: dict[str, Any], checkpoint_dir: Path | None) -> None:
        if metrics["step"] == kill_at:
            raise Killed

    sample = sample or partial(sample_texts, config, data)
    return fit(config, data, run_dir, report=report, sample=sample, device=device, fetch=fetch)


def killed_run(config: Config, data: TokenData, run_dir: Path, *, at: Sequence[int]) -> Any:
    """A run that is killed at these steps, resumed each time, and ends."""
    for step in at:
        with pytest.raises(Killed):
            run(config, data, run_dir, kill_at=step)
    return run(config, data, run_dir)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
