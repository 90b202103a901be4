"""Ray's processes run the gptray that runs the job, or the job does not start."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptray.jobs.cluster.own_code import check_own_code, own_code
from gptray.jobs.cluster.shared_storage import problem_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of gptray."""
    shutil.copytree(ROOT / "gptray", tmp_path / "gptray", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_copy_of_the_same_code_is_as_good(clone: Path) -> None:
    check_own_code()


def test_a_folder_of_runs_is_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gptray" / "book").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    check_own_code()


def test_a_job_does_not_start_beside_another_gptray(clone: Path) -> None:
    (clone / "gptray" / "wording.py").write_text("", "utf-8")
    command = [sys.executable, str(ROOT / "jobs/prepare.py"), f"storage_path={clone / 'runs'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"prepare: {clone / 'gptray'} is not the gptray that runs this job, " in done.stderr
    assert done.stderr.endswith(f"(pip install -e {clone})\n")


def test_a_node_with_another_gptray_is_a_problem() -> None:
    assert problem_of([], code=own_code()) is None
    assert problem_of([], code="another") == (
        "gptray",
        "has another gptray than the one that runs this job; install the same one on every node, "
        "or start the job with ray job submit --working-dir",
    )
