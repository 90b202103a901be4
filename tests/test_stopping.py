"""A training as a process: alone, killed, or with a dead Ray, it ends with the same bits."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gptray.storage.files import cache_folder, sha256_of
from gptray.storage.record import EVENTS, METRICS, read_rows
from tests.processes import before_long, listening, marked
from tests.test_jobs import ROOT, TINY

pytestmark = pytest.mark.ray


def environment(home: Path) -> dict[str, str]:
    """That of a job with another home, and with the native library of this one."""
    return {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(cache_folder().parent)}


@contextmanager
def training(command: list[str], home: Path, *, step: int) -> Iterator[subprocess.Popen[str]]:
    """A training in a process group of its own that has logged this step."""
    driver = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(home),
        start_new_session=True,
    )
    deadline = threading.Timer(180, driver.kill)
    deadline.start()
    try:
        assert driver.stderr
        said = []
        for line in driver.stderr:
            said.append(line)
            if (found := re.match(r"step +(\d+)/", line)) and int(found[1]) >= step:
                break
        else:
            raise AssertionError(f"it ended before step {step}: {''.join(said)}")
        deadline.cancel()  # what waits for its end has one of its own
        yield driver
    finally:
        deadline.cancel()
        driver.kill()
        driver.communicate()


def command_of(text_file: Path, home: Path, name: str, *more: str) -> list[str]:
    """A training's command. Its storage is the home's parent."""
    home.mkdir(exist_ok=True)
    tiny = [
        one for one in TINY if one.split("=")[0] not in ("train.max_steps", "train.eval_interval")
    ]
    words = [
        f"data.source={text_file}",
        f"storage_path={home.parent}",
        f"name={name}",
        *tiny,
        *more,
    ]
    return [sys.executable, str(ROOT / "jobs" / "train.py"), *words]


def named(name: str, home: Path) -> list[int]:
    """The training's processes whose command line has this name."""
    return [pid for pid, command in marked(f"HOME={home}").items() if name in command]


def kill(name: str, home: Path) -> None:
    (pid,) = named(name, home)
    os.kill(pid, signal.SIGKILL)


def check_failed(driver: subprocess.Popen[str], sentence: str, home: Path) -> None:
    """It ends with exit code 1 and this sentence, and nothing of it is left."""
    out, said = driver.communicate(timeout=60)
    assert (driver.returncode, out) == (1, "")
    assert f"train: {sentence}, killed or out of memory; the same command resumes" in said
    assert "Traceback" not in said
    before_long(lambda: not marked(f"HOME={home}"))


STEPS = 400
WORKERS = [
    f"train.max_steps={STEPS}",
    "train.eval_interval=20",
    "train.log_interval=1",
    "train.patience=null",
    "model.dropout=0.1",
    "compute.num_workers=2",
    "compute.cpus_per_worker=1",
]


@pytest.fixture(scope="module")
def undisturbed(
    text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Two workers' run, left alone: its folder, and what the command printed.

    Python has warnings as errors, which Ray itself does not survive.
    """
    home = tmp_path_factory.mktemp("storage") / "home"
    command = command_of(text_file, home, "undisturbed", *WORKERS)
    strict = {**environment(home), "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=strict, timeout=300)
    return home.parent / "undisturbed", done


def outcome(run_dir: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """All of a run that must not depend on what happened to it."""
    last = f"checkpoint_{STEPS:06d}"
    names = ["model/model.safetensors", f"{last}/model/model.safetensors"]
    bits = [sha256_of(run_dir / name) for name in [*names, f"{last}/optimizer.safetensors"]]
    rows = read_rows(run_dir / METRICS)
    return bits, [{key: row[key] for key in row if key != "tokens_per_sec"} for row in rows]


def test_train_ends_with_one_json_line_and_plain_progress(
    undisturbed: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run_dir, done = undisturbed
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["step"] == STEPS and Path(result["model_dir"], "model.safetensors").is_file()
    assert f"step {STEPS}/{STEPS}" in done.stderr and "\x1b" not in done.stderr
    assert "Traceback" not in done.stderr and "ray" not in done.stderr.lower().split()
    assert [row["step"] for row in read_rows(run_dir / METRICS)] == list(range(1, STEPS + 1))


@pytest.mark.timeout(1200)  # four trainings in turn, with minutes of Ray's own where cores are busy
def test_a_run_that_is_killed_in_every_way_ends_with_the_same_bits(
    undisturbed: tuple[Path, subprocess.CompletedProcess[str]], text_file: Path
) -> None:
    storage = undisturbed[0].parent
    home, run_dir = storage / "home", storage / "killed"
    command = command_of(text_file, home, "killed", *WORKERS)
    with training(command, home, step=22) as driver:
        sockets = listening(marked(f"HOME={home}"))
        assert {address for address, _ in sockets} == {"127.0.0.1"}
        driver.kill()

    with training(command, home, step=42) as driver:
        before_long(lambda: len(named("raylet/raylet ", home)) == 1)  # the killed driver's is gone
        kill("raylet/raylet ", home)
        check_failed(driver, "Ray's process raylet died", home)

    with training(command, home, step=62) as driver:
        os.killpg(driver.pid, signal.SIGTERM)
        out, said = driver.communicate(timeout=60)
        assert (driver.returncode, out) == (130, "")
        assert "train: interrupted" in said and "Traceback" not in said
        stopped, resume, again, *_ = said[said.index("stopped after step") :].splitlines()
        assert str(run_dir) in stopped and resume == "resume:"
        script, config = ROOT / "jobs" / "train.py", run_dir / "config.yaml"
        assert shlex.split(again) == [sys.executable, str(script), "--config", str(config)]
        before_long(lambda: not marked(f"HOME={home}"))

    with training(shlex.split(again), home, step=82) as driver:
        starts = [row for row in read_rows(run_dir / EVENTS) if row["event"] == "start"]
        os.kill(starts[-1]["pid"], signal.SIGKILL)  # the first worker
        out, said = driver.communicate(timeout=300)
        assert driver.returncode == 0, said
        assert json.loads(out)["step"] == STEPS

    assert outcome(run_dir) == outcome(undisturbed[0])
    # Ray would leave a token there, for a later `ray start` to ask of clients that have none.
    assert not (home / ".ray").exists()


@pytest.mark.chaos
def test_a_dead_controller_ends_a_training_in_one_sentence(text_file: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = command_of(text_file, home, "run", "train.max_steps=100000", "train.eval_interval=2")
    with training(command, home, step=3) as driver:
        kill("ray::TrainController", home)
        check_failed(driver, "Ray Train's controller died", home)
