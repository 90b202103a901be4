"""Jobs on a cluster, run by one process one after another: what it imports takes seconds.

A test that sends a job signals, or reads what it tells while it runs, has it in a process of its
own: `tests.jobs.nodes.job`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from subprocess import CompletedProcess

# Reads a job's name and words from a line; answers with its exit code, stdout and stderr.
_DRIVER = """
import contextlib, io, json, os, sys
from gptray.entry_points import run

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # for what Ray's core prints
for line in sys.stdin:
    name, words = json.loads(line)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            code = run(name, words)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=answers, flush=True)
"""
LIMIT_S = 240


class Driver:
    """The process; its environment says which cluster it joins."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, name: str, *words: str) -> CompletedProcess[str]:
        """What `python jobs/NAME.py WORDS` ends with and says."""
        assert self._process.stdin and self._process.stdout
        clock = threading.Timer(LIMIT_S, self._process.kill)
        clock.start()
        try:
            print(json.dumps([name, words]), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        finally:
            clock.cancel()
        assert answer, f"{name} has ended its process"
        return CompletedProcess([name, *words], *json.loads(answer))


@contextmanager
def driver(environment: Mapping[str, str] | None = None) -> Iterator[Driver]:
    """Have a driver. environment: by default this process's."""
    process = subprocess.Popen(
        [sys.executable, "-c", _DRIVER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Driver(process)
    finally:
        process.kill()
        process.communicate()
