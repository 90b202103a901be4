"""Time systems in turns, each in its own process with its own settings.

A busy machine then slows all of them alike, and none is affected by another's global settings.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import IO, Any, cast


class Contestant:
    """A process that runs `script --worker system ...` and answers each job, often in seconds."""

    def __init__(self, script: str, system: str, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, script, "--worker", system, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._system = system
        self._answer()  # wait for "ready"

    def ask(self, job: int) -> Any:
        print(job, file=cast(IO[str], self._process.stdin), flush=True)
        return json.loads(self._answer())

    def close(self) -> None:
        cast(IO[str], self._process.stdin).close()
        self._process.wait()

    def _answer(self) -> str:
        line = cast(IO[str], self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"{self._system} exited; its own message is above")
        return line.strip()


def answer(prepare: Callable[[], Callable[[int], Any]]) -> None:
    """The contestant's side: prepare, then answer every job on stdin with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keep libraries' prints out of the answers
    run = prepare()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(int(line))), file=answers, flush=True)


def take_turns(
    script: str, systems: Sequence[str], arguments: Sequence[str], jobs: Sequence[int], rounds: int
) -> dict[int, dict[str, list[float]]]:
    """Seconds by job and system, one for each round after a warm-up round."""
    contestants = {system: Contestant(script, system, arguments) for system in systems}
    seconds: dict[int, dict[str, list[float]]] = {}
    for job in jobs:
        seconds[job] = {system: [] for system in systems}
        for turn in range(rounds + 1):
            for system, contestant in contestants.items():
                taken = contestant.ask(job)
                if turn:
                    seconds[job][system].append(taken)
    for contestant in contestants.values():
        contestant.close()
    return seconds


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How many times as fast ours is: the median of the rounds' ratios."""
    return round(statistics.median(t / o for t, o in zip(theirs, ours, strict=True)), 3)
