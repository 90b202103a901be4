"""The worth benchmark: its arithmetic, and a tiny run of all of it that goes on where it was."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.damage import deadline

ROOT = Path(__file__).resolve().parent.parent
CURVE = [(0.25, 3.0), (0.5, 2.8), (1.0, 2.7)]


@pytest.fixture(scope="module")
def table() -> dict[str, Callable[..., Any]]:
    return runpy.run_path(str(ROOT / "benchmarks" / "worth_table.py"))


def test_summary_says_what_lies_beyond(table: dict[str, Callable[..., Any]]) -> None:
    old = {fraction: [loss, loss + 0.02, loss - 0.02] for fraction, loss in CURVE}
    new = {"recipe": [2.8, 2.8, 2.8], "ensemble": [2.6], "pupil": [2.65, 2.65, 2.65]}
    found = table["summary"](old, new, trained_on=0.25)
    assert found["old"]["0.5"] == [2.8, 0.05]  # 4.303 x 0.02 / sqrt(3)
    middle, low, high = found["worth"]["recipe"]
    assert 1.5 < low < middle < high < 3 and middle == pytest.approx(2.0, abs=0.2)
    assert found["worth"]["ensemble"][0] == 4.0  # the curve's end
    assert found["beyond"] == ["ensemble", "pupil"]
    assert found["pupil_keeps"] == 0.75


@pytest.mark.slow
def test_benchmark_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The number {n} follows {n - 1}.\n" for n in range(700)))

    command = [sys.executable, str(ROOT / "benchmarks" / "worth.py"), str(text), "--quick"]
    command += ["--folder", str(tmp_path)]

    def quick() -> tuple[list[str], dict[str, Any]]:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
        return rows.read_text().splitlines(), json.loads(done.stdout.splitlines()[-1])

    rows = tmp_path / "quick" / "results.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE) as killed, deadline():
        assert killed.stdout and killed.stdout.readline()  # the first run's row
        killed.kill()
        killed.stdout.read()  # until the last process that could write has ended
    first, found = quick()
    assert set(found["text"]["worth"]) >= {"recipe", "ensemble", "pupil"}
    kept = [line for line in first if json.loads(line)["way"] not in ("with ema", "pupil")]
    assert len(kept) == len(first) - 4
    rows.write_text("".join(f"{line}\n" for line in kept))
    again, as_before = quick()
    assert again[: len(kept)] == kept
    assert len(again) == len(first)
    assert as_before == found
