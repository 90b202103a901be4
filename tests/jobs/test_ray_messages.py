"""Ray's messages about processes that it ended, as one sentence."""

from __future__ import annotations

import logging
import sys

import pytest

from gptray.jobs.cluster.ray_messages import RayMessages, why_ended

# As Ray 2.60 prints it, shortened.
KILLED = (
    "Task _map_task failed due to oom. There are infinite oom retries remaining, so the task will "
    "be retried. Error: 1 worker(s) were killed due to the node running low on memory. Memory on "
    "the node (IP: 127.0.0.1, ID: 585c34c6) was 23.54GB / 23.54GB.\nOOM kill reason: Memory usage "
    "24022204928B exceeded threshold of 24012825536B (95.0% of 25276510208B limit)\nObject store "
    "memory usage: [- objects spillable: 0\n- bytes spillable: 0]\nRefer to the documentation on "
    "how to address the out of memory issue: https://docs.ray.io/en/latest."
)
LOST = (
    "A worker died or was killed while executing a task by an unexpected system error. To "
    "troubleshoot the problem, check the logs for the dead worker. Lease ID: 02000000c50c "
    "Worker ID: 92bb706f Node ID: c2b0c531 Worker IP address: 127.0.0.1 Worker PID: 22420"
)
FULL = "the node's memory was nearly full (24.0 of 25.3 GB in use)"
WHY = f"Ray killed its process because {FULL}"


def test_a_full_memory_is_told_in_a_sentence() -> None:
    assert why_ended(KILLED) == WHY
    assert why_ended(RuntimeError(KILLED), otherwise="another") == WHY


@pytest.mark.parametrize(
    ("error", "why"),
    [
        ("The actor died.\nactor_id: 1\nIts node is gone.\n", "Its node is gone."),
        (ValueError(" wrong "), "wrong"),
        ("", "its process died"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_other_errors_are_told_by_their_last_line(error: Exception | str, why: str) -> None:
    assert why_ended(error) == why


def test_a_process_that_died_is_told_without_ids(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "gptray"):
        print(f"\x1b[33m(raylet)\x1b[0m {LOST}", file=RayMessages())
    assert caplog.messages == ["Ray lost a process, which was killed or out of memory"]
    assert "Lease ID" not in capsys.readouterr().err


def test_killed_processes_are_told_at_most_now_and_then_and_the_rest_as_it_is(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    stream = RayMessages()
    with caplog.at_level(logging.WARNING, "gptray"):
        print("before", file=stream)
        for _ in range(3):
            print(f"\x1b[33m(raylet)\x1b[0m {KILLED}", file=stream)
        print("after", file=stream)
    assert caplog.messages == [f"Ray killed a process because {FULL}; its work is repeated"]
    out, err = capsys.readouterr()
    # The jobs' own log may go there too.
    passed_on = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert (out, passed_on) == ("", ["before", "after"])
    assert stream.isatty() == sys.stderr.isatty()
