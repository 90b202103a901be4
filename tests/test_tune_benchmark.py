"""The sweep's benchmark: replays of curves that are known, and a tiny grid that goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gptray.config import load_config
from gptray.tuning.sweep_record import Trial

ROOT = Path(__file__).resolve().parent.parent
# One in four goes on from step 10; all steps are 40.
KEYS = ["optim.schedule=constant", "train.max_steps=40", "train.eval_interval=10"]
FOUR = load_config(None, [*KEYS, "tune.reduction_factor=4"])


@pytest.fixture(scope="module")
def tune_replay() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import tune_replay

        yield tune_replay
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def curves(module: ModuleType, losses: Sequence[Sequence[float]]) -> list[Any]:
    """Trials 0, 1, ... with a loss every 10 steps."""
    return [
        module.Curve(
            Trial(
                str(name), {}, 10 * len(row), None, "finished", True, 10 * len(row), None,
                [{"step": 10 * n, "val_bpb": loss} for n, loss in enumerate(row, start=1)],
            ),
            seconds=1.0,
        )
        for name, row in enumerate(losses)
    ]  # fmt: skip


def steady(order: Sequence[int]) -> list[list[float]]:
    """Losses of trials that stay in this order."""
    return [[3.0 + place - 0.1 * n for n in range(4)] for place in order]


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_replay_runs_all_to_the_rung_and_the_best_to_its_end(
    tune_replay: ModuleType, at_once: int
) -> None:
    found = tune_replay.replay(
        FOUR, curves(tune_replay, steady([2, 0, 3, 1])), "0123", at_once=at_once
    )
    assert found == tune_replay.Outcome(share=(4 * 10 + 30) / 160, rank=1, behind=0)


def test_a_replay_tells_how_far_behind_a_sweep_is_that_promotes_the_wrong_trial(
    tune_replay: ModuleType,
) -> None:
    crossing = [[3.0, 2.9, 2.9, 2.9], [3.1, 2.7, 2.6, 2.5], [3.2, 3.0, 2.8, 2.7], [4.0] * 4]
    found = tune_replay.replay(FOUR, curves(tune_replay, crossing), "3210")
    assert (found.rank, found.behind) == (3, pytest.approx(2.9 / 2.5 - 1))


def test_figures_hold_for_every_order(tune_replay: ModuleType) -> None:
    found = tune_replay.figures(FOUR, curves(tune_replay, steady([2, 0, 3, 1])), orders=5)
    assert found["rank_correlation"] == {"10": 1.0}
    assert found["shares"] == [0.438] * 3 and found["close"] == 1.0
    reverse = [[3.0 + n, 3.0 - n] for n in range(4)]
    assert tune_replay.rank_correlation([c.trial for c in curves(tune_replay, reverse)], 10) == -1


@pytest.mark.slow
def test_the_benchmark_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The number {n} follows {n - 1}.\n" for n in range(300)))
    config = tmp_path / "sweep.yaml"
    config.write_text(json.dumps(tiny_sweep()))

    def run() -> tuple[list[str], dict[str, Any]]:
        command = [sys.executable, str(ROOT / "benchmarks" / "tune.py"), str(text)]
        command += [f"--config={config}", f"--folder={tmp_path}", "--seeds=1", "--characters=6000"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
        return rows.read_text().splitlines(), json.loads(done.stdout.splitlines()[-1])

    rows = tmp_path / "curves.jsonl"
    first, found = run()
    assert len(first) == 4 and found["summary"]["close"] in ("0 of 1", "1 of 1")
    rows.write_text("".join(f"{line}\n" for line in first[:3]))
    again, as_before = run()
    assert again[:3] == first[:3]
    drop = {"seconds": 0}
    assert json.loads(again[3]) | drop == json.loads(first[3]) | drop
    assert as_before["replays"][0]["best_val_bpb"] == found["replays"][0]["best_val_bpb"]


def tiny_sweep() -> dict[str, object]:
    """A sweep of four trials of six steps."""
    return {
        "data": {"tokenizer": "char"},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16},
        "train": {
            "max_steps": 6, "eval_interval": 2, "block_size": 16, "global_batch_size": 2,
            "backend": "torch", "precision": "fp32",
        },
        "optim": {"warmup_steps": 1},
        "tune": {"num_samples": 3, "space": [{"path": "optim.lr", "loguniform": [1e-3, 1e-2]}]},
    }  # fmt: skip
