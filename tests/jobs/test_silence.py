"""Every job on a cluster of unlike nodes: it runs or is refused, and is never silent for long.

The head has no core, one node has a GPU as Ray counts them, another a core.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.nodes import LIMIT_S, cluster_of, free_port, job

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.xdist_group("nodes")]
JOBS = ["train", "tune", "evaluate", "generate", "serve"]
SILENT_S, REFUSED_S = 10.0, 20.0


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[list[str]]:
    """Run a cluster; give what every job on it is told."""
    folder = tmp_path_factory.mktemp("silence")
    prompts = folder / "prompts.txt"
    prompts.write_text("the cat\n" * 200)
    asked = [
        f"storage_path={folder}", "train.max_steps=20", "train.block_size=32",
        "model.n_layer=1", "model.n_embd=32", "data.vocab_size=300",
        "tune.space=[{path: optim.lr, choice: [1e-3, 2e-3]}]", "tune.num_samples=2",
        f"evaluate.model={model_dir}", "evaluate.passages=4", f"generate.model={model_dir}",
        f"generate.input_path={prompts}",
        f"serve.model={model_dir}", f"serve.port={free_port()}",
    ]  # fmt: skip
    with cluster_of({"num_cpus": 0}, {"num_cpus": 2, "num_gpus": 1}, {"num_cpus": 1}):
        yield asked


def told_by(process: subprocess.Popen[str]) -> list[tuple[float, str]]:
    """The lines of a job, each with the time at which it came; an endpoint is stopped then."""
    assert process.stderr
    lines = [(time.monotonic(), "started")]
    for line in process.stderr:
        lines.append((time.monotonic(), line))
        if "serving " in line:
            process.terminate()
    process.wait(timeout=LIMIT_S)
    lines.append((time.monotonic(), "ended"))
    return lines


def check_never_silent(lines: list[tuple[float, str]]) -> None:
    told = "".join(f"{at - lines[0][0]:6.1f} {line}" for at, line in lines[1:-1])
    for (before, _), (after, _) in zip(lines, lines[1:], strict=False):
        assert after - before <= SILENT_S, f"silent for {after - before:.1f} s:\n{told}"


@pytest.mark.parametrize("name", JOBS)
def test_a_job_runs_and_is_never_silent(words: list[str], name: str, tmp_path: Path) -> None:
    with job(name, *words, f"name={name}", f"generate.output_path={tmp_path / 'out'}") as process:
        lines = told_by(process)
    assert process.returncode == 0, lines
    check_never_silent(lines)


@pytest.mark.parametrize("name", JOBS)
def test_a_gpu_that_is_none_is_refused_at_once_in_words(
    words: list[str], name: str, tmp_path: Path
) -> None:
    words = [*words, f"generate.output_path={tmp_path / 'out'}", "compute.use_gpu=true"]
    with job(name, *words, f"name=gpu-{name}") as process:
        lines = told_by(process)
    told = "".join(line for _, line in lines)
    assert process.returncode in (1, 2), told
    assert "Traceback" not in told and "compute.use_gpu=true, but" in told, told
    assert lines[-1][0] - lines[0][0] <= REFUSED_S, told
    check_never_silent(lines)
