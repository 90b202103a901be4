"""The one shape of a job, and how mistakes and failures come back from its processes."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gptray.cli import run_job
from gptray.config import Config, RunFailed, UserError, load_config
from gptray.entry_points import DOCS
from gptray.jobs.base import Job, find_job
from gptray.jobs.cluster.tasks import Failure, attempt, result_of
from gptray.jobs.train.task import TrainTask
from gptray.jobs.train.validate import validate

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_job_is_found_by_the_name_of_its_file() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == set(DOCS)
    assert {path.parent.name for path in (ROOT / "gptray" / "jobs").glob("*/run.py")} == set(DOCS)
    assert all(find_job(name) for name in DOCS)


def test_a_job_is_loaded_without_torch_and_ray() -> None:
    code = (
        "import sys\n"
        "from gptray.entry_points import DOCS\n"
        "from gptray.jobs.base import find_job\n"
        "for name in DOCS: find_job(name)\n"
        "print(sorted({'torch', 'ray', 'transformers', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("words", "expected"), [([], "check run"), (["--dry-run"], "check plan")])
def test_a_command_checks_once(words: list[str], expected: str) -> None:
    called: list[str] = []

    def check(config: Config) -> int:
        called.append("check")
        return config.train.max_steps

    def plan(steps: int) -> list[tuple[str, str]]:
        called.append("plan")
        return [("steps", str(steps))]

    def run(steps: int) -> dict[str, Any]:
        called.append("run")
        return {"steps": steps}

    assert run_job("tried", doc="", argv=words, job=Job(check, plan, run)) == 0
    assert " ".join(called) == expected


@pytest.mark.parametrize("kind", [UserError, RunFailed])
def test_mistakes_and_failures_come_back_as_themselves(kind: type[Exception]) -> None:
    def task() -> int:
        raise kind("what went wrong")

    outcome = pickle.loads(pickle.dumps(attempt(task)))
    with pytest.raises(kind, match="^what went wrong$"):
        result_of(outcome)


def test_results_and_other_errors_pass_through() -> None:
    assert result_of(attempt(lambda: 3)) == 3
    with pytest.raises(ZeroDivisionError):
        attempt(lambda: 1 // 0)
    assert isinstance(Failure("disk full").error(), RunFailed)


def test_a_scoring_that_fails_is_a_result_that_ray_can_keep(tmp_path: Path) -> None:
    task = TrainTask(Config(), tmp_path / "gone", tmp_path, threads=torch.get_num_threads())
    failure = Failure(**json.loads(json.dumps(validate(tmp_path, task)))["failure"])
    assert "manifest.json cannot be read" in failure.message and not failure.is_mistake


def test_a_task_reaches_a_process_with_what_was_given_and_what_was_not() -> None:
    config = load_config(None, ["train.block_size=32"])
    task = TrainTask(config, Path("data"), Path("run"), threads=2)
    sent = pickle.loads(pickle.dumps(task))
    assert sent == task
    assert sent.config.train.model_fields_set == {"block_size"}
