"""Jobs that are stopped: a signal interrupts, a second ends, and nothing holds the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PRELUDE = """
import signal, sys, threading
from gptray.cli import run_job
from gptray.jobs.base import Job
from gptray.jobs.cluster.connection import ray_cluster
from gptray.signals import fail, leaving_within

def say(text):
    print(text, file=sys.stderr, flush=True)

def wait():
    say("ready")
    threading.Event().wait()

def wait_forever(*signal):
    say("leaving")
    while True:
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say("interrupted again")
"""
END = """
tried = Job(check=lambda config: config, plan=lambda config: [], run=job)
sys.exit(run_job("tried", doc="", job=tried))
"""


@contextmanager
def started(job: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own that runs the function `job` and has said `ready`."""
    code = PRELUDE + textwrap.dedent(job) + END
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
        start_new_session=True,
    )
    deadline = threading.Timer(60, process.kill)
    deadline.start()
    try:
        until(process, "ready")
        yield process
    finally:
        deadline.cancel()
        process.kill()
        process.communicate()


def until(process: subprocess.Popen[str], word: str) -> None:
    """Read what it says up to a line that is this word."""
    assert process.stderr
    for line in process.stderr:
        if line.strip() == word:
            return
    raise AssertionError(f"it ended without {word!r}")


def ended(process: subprocess.Popen[str], seconds: float = 30) -> tuple[int, str]:
    """Exit code and what it still said."""
    _, said = process.communicate(timeout=seconds)
    return process.returncode, said


def signal_until_ended(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signal its group until one signal comes late enough to be another stop."""
    for _ in range(300):
        os.killpg(process.pid, number)
        try:
            process.wait(0.1)
            return
        except subprocess.TimeoutExpired:
            continue


STUCK = """
def job(config):
    try:
        wait()
    finally:
        wait_forever()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_ends_a_job_that_does_not_leave(number: signal.Signals) -> None:
    with started(STUCK) as process:
        os.killpg(process.pid, number)
        until(process, "leaving")
        signal_until_ended(process, number)
        assert ended(process, 5) == (130, "tried: interrupted\n")


@pytest.mark.ray
def test_a_signal_still_interrupts_a_job_whose_ray_has_ended(tmp_path: Path) -> None:
    job = "def job(config):\n    with ray_cluster():\n        pass\n    wait()\n"
    with started(job, HOME=str(tmp_path)) as process:
        os.kill(process.pid, signal.SIGTERM)
        assert ended(process) == (130, "tried: interrupted\n")


def test_a_job_that_does_not_leave_in_time_ends_by_itself() -> None:
    with started(f"{STUCK}\n\ninside = job\n\ndef job(config):\n"
                 "    with leaving_within(0.3):\n        inside(config)\n") as process:  # fmt: skip
        os.kill(process.pid, signal.SIGTERM)
        code, said = ended(process)
        assert code == 130 and "tried: interrupted; killed, because it had not stopped" in said


def test_signals_to_process_and_group_at_once_let_the_job_leave() -> None:
    leaves = """
    def job(config):
        try:
            wait()
        finally:
            sum(range(3_000_000))
            say("left well")
    """
    with started(leaves) as process:
        for _ in range(3):
            os.kill(process.pid, signal.SIGTERM)
            os.killpg(process.pid, signal.SIGTERM)
        assert ended(process) == (130, "left well\ntried: interrupted\n")


def test_a_handler_that_a_library_puts_in_place_does_not_hold_ctrl_c() -> None:
    held = """
    def job(config):
        signal.signal(signal.SIGINT, lambda number, frame: threading.Event().wait())
        wait()
    """
    with started(held) as process:
        os.killpg(process.pid, signal.SIGINT)
        assert ended(process) == (130, "tried: interrupted\n")


def test_a_thread_that_waits_does_not_hold_an_interrupted_job() -> None:
    thread = """
    def job(config):
        threading.Thread(target=threading.Event().wait).start()
        wait()
    """
    with started(thread) as process:
        os.kill(process.pid, signal.SIGTERM)
        assert ended(process) == (130, "tried: interrupted\n")


def test_a_failure_seen_by_a_thread_interrupts_the_job_that_waits() -> None:
    failing = """
    def job(config):
        threading.Timer(0.1, fail, ["Ray died"]).start()
        with leaving_within(0.3):
            try:
                wait()
            finally:
                wait_forever()
    """
    with started(failing) as process:
        until(process, "leaving")
        code, said = ended(process)
        assert code == 1 and "tried: Ray died" in said
