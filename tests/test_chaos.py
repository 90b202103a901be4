"""Kills at random moments, by the commands that README names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.ray]
ROOT = Path(__file__).resolve().parent.parent


def test_killed_runs_end_with_the_same_bits() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--rounds=10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["passed"] == 10


def test_a_killed_sweep_ends_as_if_nothing_was() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos_tune.py"), "--kills=5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["kills"] == 5
