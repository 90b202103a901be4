"""Threads that wait sleep while this process shares its cores, and results keep their bits."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from threading import Event, Thread

import pytest
import torch

from gptray.native.core_sharing import CoreSharing, share_cores

DEADLINE_S = 60.0


@pytest.fixture
def sharing() -> CoreSharing:
    found = share_cores()
    if found is None:
        pytest.skip("no GNU OpenMP, or a system that does not count")
    return found


def wait_until(holds: Callable[[], bool]) -> None:
    end, pause = time.monotonic() + DEADLINE_S, Event()
    while not holds():
        assert time.monotonic() < end
        pause.wait(0.05)


def queue_for_one_core(done: Event) -> None:
    """Three threads that compute on the same core until `done`."""
    core, text = {min(os.sched_getaffinity(0))}, bytes(1 << 20)

    def compute() -> None:
        os.sched_setaffinity(0, core)  # of this thread alone
        while not done.is_set():
            hashlib.sha256(text)

    for _ in range(3):
        Thread(target=compute, daemon=True).start()


def test_cores_are_shared_while_threads_queue_for_them(sharing: CoreSharing) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 200)
    alone, done = x @ x, Event()
    cores = len(os.sched_getaffinity(0))
    before = len(os.listdir("/proc/self/task"))
    if sharing.is_shared:  # other processes want the cores already
        before -= cores + 1
    queue_for_one_core(done)
    try:
        wait_until(lambda: sharing.is_shared)
        wait_until(lambda: len(os.listdir("/proc/self/task")) > before + 3 + cores)
        assert torch.equal(x @ x, alone)
    finally:
        done.set()
    wait_until(lambda: not sharing.is_shared)
    assert torch.equal(x @ x, alone)


def test_a_process_ends_while_it_shares_cores() -> None:
    code = (
        "from tests.native.test_core_sharing import *\n"
        "if sharing := share_cores():\n"
        "    queue_for_one_core(Event())\n"
        "    wait_until(lambda: sharing.is_shared)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=DEADLINE_S).returncode == 0
