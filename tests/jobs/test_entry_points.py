"""The ways to start a job: `gptray JOB`, `python -m gptray JOB` and jobs/JOB.py."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from gptray.entry_points import DOCS, main
from gptray.jobs.base import find_job

ROOT = Path(__file__).resolve().parents[2]


def console_script(folder: Path) -> Path:
    """`gptray` as pip installs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, function = project["scripts"]["gptray"].partition(":")
    script = folder / "gptray"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
    )
    script.chmod(0o755)
    return script


def by_script(folder: Path, job: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / f"{job}.py")]


def by_module(folder: Path, job: str) -> list[str]:
    return [sys.executable, "-m", "gptray", job]


def by_console(folder: Path, job: str) -> list[str]:
    (folder / "bin").mkdir(exist_ok=True)
    return [str(console_script(folder / "bin")), job]


def by_name(folder: Path, job: str) -> list[str]:
    console_script(folder)
    return ["gptray", job]


def started(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The command in a folder that has nothing to do with the repository."""
    path = f"{folder}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("entry", [by_script, by_module, by_console, by_name])
def test_a_command_that_a_job_prints_starts_a_job_in_the_same_way(
    tmp_path: Path, entry: Callable[[Path, str], list[str]]
) -> None:
    storage = tmp_path / "my runs"
    (storage / "book").mkdir(parents=True)
    (storage / "book" / "config.yaml").write_text("name: book\n")
    words = ["generate.model=letters", f"storage_path={storage}", "sample.prompt=a"]
    wrong = started([*entry(tmp_path, "generate"), *words], tmp_path)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    found = re.search(r"; ([^;]*) lists all runs", wrong.stderr)
    assert found, wrong.stderr
    command = shlex.split(found[1])
    assert command == [*entry(tmp_path, "runs"), f"storage_path={storage}"]
    listed = started(command, tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert '"name": "book"' in listed.stdout.splitlines()[-1]


def test_every_job_has_a_script_and_its_check_plan_and_run() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == set(DOCS)
    for name in DOCS:
        assert f'run("{name}")' in (ROOT / "jobs" / f"{name}.py").read_text()
        assert callable(find_job(name).check)


def test_help_lists_the_jobs_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name, doc in DOCS.items():
        assert f"  {name:10}{doc.splitlines()[0]}\n" in out
    assert main([]) == 2
    assert capsys.readouterr() == ("", out)


def test_help_of_a_job_has_its_text_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python jobs/train.py [--config FILE]")
    assert DOCS["train"].strip() in out and "optim.lr=" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "gptray: unknown job trian; did you mean train?"),
        (["xyz"], f"gptray: unknown job xyz; jobs: {', '.join(DOCS)}"),
        (["name=a"], "gptray: name the job first, as in gptray train name=a; jobs: "),
        (["--dry-run", "train"], "gptray: name the job first, as in gptray train --dry-run"),
    ],
)
def test_an_unknown_job_gets_the_nearest_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(said) and err.count("\n") == 1


def test_a_job_gets_the_words_after_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["runs", f"storage_path={tmp_path}", "--dry-run"]) == 0
    assert f"0 in {tmp_path}" in capsys.readouterr().out
    assert main(["runs", "storage_pth=a"]) == 2
    assert "did you mean storage_path?" in capsys.readouterr().err
