"""The GPU benchmark's dry run: every part, on a CPU, in tiny shapes."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--device", "cpu", "--tiny")


def benchmark(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_dry_run_goes_through_every_part(tmp_path: Path) -> None:
    done = benchmark(*TINY, "--out", str(tmp_path / "cpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "cpu.json").read_text("utf-8"))
    assert figures["machine"]["torch"] == torch.__version__
    for part in ("facts", "right", "train", "gen", "more", "adapters", "quant", "serve"):
        assert figures[f"{part}: seconds"] >= 0
    assert figures["right: same bits, fp32"] == {"twice": True, "resumed": True}
    equal = figures["right: equal rows, alone and in a batch of 4, fp32"]
    assert equal == {"greedy": 1.0, "top_k": 1.0, "top_p": 1.0, "all": 1.0}
    for name in ("nanoGPT's loop, eager, B=2", "transformers, eager, B=2", "gptray, eager, B=2"):
        assert figures[f"train: {name}"]["tokens_per_s"] > 0
    assert figures["gen: decode step, B=8"]["operators"] > 0
    assert figures["adapters: step with 32 of rank 8 by torch, B=8"]["ms"] > 0
    for kind in ("bf16", "int8", "int4", "iq4_nl"):
        assert figures[f"quant: product 64 x 96, {kind}, B=8"]["ms"] > 0
    assert figures["quant: decode step, int4, B=8"]["ms"] > 0


def in_this_process(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Run it without another import of torch; return its exit code."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"), run_name="__main__")
    return ended.value.code


def test_part_that_fails_does_not_stop_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = str(tmp_path / "missing")
    code = in_this_process(monkeypatch, *TINY, "--parts", "right,facts", "--data", missing)
    assert code == 1
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "missing" in figures["right"]["failed"]
    assert "facts: bf16 GEMM, TFLOP/s" in figures


def test_it_ends_when_its_seconds_are_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_this_process(monkeypatch, *TINY, "--seconds", "0") == 0
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])) == ["machine"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--parts", "train,gne"), "no such part: gne"),
        pytest.param(
            (),
            "PyTorch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    assert in_this_process(monkeypatch, *arguments) == 2
    assert words in capsys.readouterr().err
