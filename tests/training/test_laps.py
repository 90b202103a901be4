"""Where the time of training goes: every step is counted once, and every second has its part."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from gptray.data.tokens import TokenData
from gptray.training.laps import PARTS
from gptray.training.loop import fit
from tests.tiny import tiny_config
from tests.training.runs import CPU


def test_every_step_and_every_second_is_told(
    text_file: Path, tiny_data: TokenData, tmp_path: Path
) -> None:
    told: list[int] = []
    seconds: Counter[str] = Counter()

    def timed(steps: int, passed: Mapping[str, float]) -> None:
        told.append(steps)
        seconds.update(passed)

    keys = ["train.log_interval=4", "train.micro_batch_size=2"]
    began = time.perf_counter()
    fit(
        tiny_config(text_file, tmp_path, *keys),
        tiny_data,
        tmp_path / "run",
        report=lambda metrics, checkpoint: None,
        sample=lambda model: [],
        device=CPU,
        timed=timed,
    )
    assert told == [4, 4, 2, 2, 4, 4]  # rows at 4, 8, 10 (evaluated), 12, 16 and 20
    assert set(seconds) == set(PARTS)
    assert 0 < sum(seconds.values()) < time.perf_counter() - began
    parts = ("data", "forward_backward", "update", "evaluation")
    assert all(seconds[part] > 0 for part in parts)
