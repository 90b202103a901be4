"""A training as a process that is stopped, or whose Ray dies: it ends soon, whole, and resumes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import listening, marked
from tests.test_jobs import ROOT, TINY

pytestmark = pytest.mark.ray


def before_long(happened: Callable[[], object]) -> None:
    """Wait until something has happened; a minute at most."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def training(arguments: list[str], home: Path) -> Iterator[subprocess.Popen[str]]:
    """A training in a process group of its own that has logged some steps."""
    driver = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "train.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HOME": str(home)},
        start_new_session=True,
    )
    deadline = threading.Timer(180, driver.kill)
    deadline.start()
    try:
        assert driver.stderr
        steps = (line for line in driver.stderr if line.startswith("step"))
        for _ in range(3):
            next(steps)
        yield driver
    finally:
        deadline.cancel()
        driver.kill()
        driver.communicate()


def begun(text_file: Path, tmp_path: Path) -> tuple[list[str], Path]:
    """A training's arguments, to which it would keep for long, and an empty home."""
    home = tmp_path / "home"
    home.mkdir()
    tiny = [one for one in TINY if not one.startswith("train.max_steps")]
    text, storage = f"data.source={text_file}", f"storage_path={tmp_path}"
    return [text, storage, "name=run", *tiny, "train.max_steps=100000"], home


def kill(name: str, home: Path) -> None:
    """Kill the process of the training whose command line has this name."""
    (pid,) = [pid for pid, command in marked(f"HOME={home}").items() if name in command]
    os.kill(pid, signal.SIGKILL)


def check_failed(driver: subprocess.Popen[str], sentence: str, home: Path) -> None:
    """It ends with exit code 1 and this sentence, and nothing of it is left."""
    out, said = driver.communicate(timeout=60)
    assert (driver.returncode, out) == (1, "")
    assert f"train: {sentence}, killed or out of memory; the same command resumes" in said
    assert "Traceback" not in said
    before_long(lambda: not marked(f"HOME={home}"))


def test_a_dead_raylet_or_a_signal_to_the_group_ends_a_training_that_resumes(
    text_file: Path, tmp_path: Path
) -> None:
    arguments, home = begun(text_file, tmp_path)
    with training([*arguments, "compute.num_workers=2"], home) as driver:
        sockets = listening(marked(f"HOME={home}"))
        assert {address for address, _ in sockets} == {"127.0.0.1"}
        kill("raylet/raylet ", home)
        check_failed(driver, "Ray's process raylet died", home)

    with training([*arguments, "compute.num_workers=2"], home) as driver:
        os.killpg(driver.pid, signal.SIGTERM)
        out, said = driver.communicate(timeout=60)
        assert (driver.returncode, out) == (130, "")
        assert "train: interrupted" in said and "Traceback" not in said
        stopped, resume, command, *_ = said[said.index("stopped after step") :].splitlines()
        assert str(tmp_path / "run") in stopped and resume == "resume:"
        script, config = ROOT / "jobs" / "train.py", tmp_path / "run" / "config.yaml"
        assert shlex.split(command) == [sys.executable, str(script), "--config", str(config)]
        before_long(lambda: not marked(f"HOME={home}"))

    # Ray would leave a token there, for a later `ray start` to ask of clients that have none.
    assert not (home / ".ray").exists()


@pytest.mark.chaos
def test_a_dead_controller_ends_a_training_in_one_sentence(text_file: Path, tmp_path: Path) -> None:
    arguments, home = begun(text_file, tmp_path)
    with training(arguments, home) as driver:
        kill("ray::TrainController", home)
        check_failed(driver, "Ray Train's controller died", home)
