"""Stop every job by a signal to its driver or process group, and check that nothing is left.

  python benchmarks/stopping.py
  python benchmarks/stopping.py --jobs train serve --ways group-TERM kill-raylet

Each job runs on a tiny model and text and is stopped while it works: by SIGTERM or SIGINT to the
driver or to the whole process group (as `timeout`, a service manager or Ctrl-C in a terminal send
them), by SIGKILL to the driver, or by killing one of its Ray processes. The table has the exit
code, the seconds until the driver exited and until the job's last process was gone, and whether
the same command then resumed and succeeded. Prints, last, one JSON line; exit code 1 if a stop took
longer than ten seconds, left a process, printed a traceback or did not resume.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny import TRAINED, free_port, job_command, make_tiny_model, tiny_text

LIMIT_S, START_S = 10.0, 120.0
MARK = "GPTRAY_STOPPING"
# A job is at work once it prints this, or once it has a process of this name.
BEGUN = {
    "train": "step  30",
    "tune": "ray::ImplicitFunc",
    "prepare": "ray::Map",
    "evaluate": "ray::Scorer",
    "generate": "400 rows  ",
    "serve": "serving",
}
# Expected exit codes by way; serve drains on SIGTERM and exits with 0.
CODES = {"TERM": 130, "INT": 130, "KILL": -9, "kill": 1}
WAYS = ("driver-TERM", "driver-INT", "group-TERM", "group-INT", "twice-TERM", "driver-KILL")
DEATHS = ("kill-raylet", "kill-gcs_server", "kill-TrainController")


@dataclass
class Started:
    """A job's driver, the lines it printed, and the mark in the environment of its processes."""

    process: subprocess.Popen[str]
    mark: str
    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)

    def has_printed(self, word: str) -> bool:
        return any(word in line for line in self.stderr)

    def has_begun(self, word: str) -> bool:
        if word.startswith("ray::"):
            return any(name.startswith(word) for name in self.alive().values())
        return self.has_printed(word)

    def alive(self) -> dict[int, str]:
        """The names of the job's running processes, by process id."""
        found = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                pid = int(entry.name)
                if self.mark.encode() in (entry / "environ").read_bytes():
                    name = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    if name:
                        found[pid] = name
        return found


def start(command: Sequence[str], env: Mapping[str, str]) -> Started:
    """Start a job in its own process group, as a shell or a service manager does."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **env, MARK: mark},
        start_new_session=True,
    )
    started = Started(process, mark)
    for stream, lines in ((process.stdout, started.stdout), (process.stderr, started.stderr)):
        threading.Thread(target=lines.extend, args=(stream,), daemon=True).start()
    return started


def wait(happened: Callable[[], object], seconds: float) -> float | None:
    """Wait until it has happened; return the seconds, or None if the time ran out."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if happened():
            return time.monotonic() - began
        time.sleep(0.02)
    return None


def send(started: Started, way: str) -> None:
    """Stop a job in one of WAYS or DEATHS."""
    how, _, what = way.partition("-")
    pid = started.process.pid
    if how == "kill":
        for one, name in started.alive().items():
            if what in name:
                os.kill(one, signal.SIGKILL)
        return
    number = signal.Signals[f"SIG{what}"]
    if how == "group":
        os.killpg(pid, number)
        return
    os.kill(pid, number)
    if how == "twice":
        time.sleep(1.5)  # an earlier signal counts as part of the first stop
        with suppress(ProcessLookupError):
            os.killpg(pid, number)


def stop(
    command: Sequence[str], job: str, way: str, env: Mapping[str, str], *, again: bool
) -> dict[str, Any]:
    """Start a job, stop it at work, wait for its last process to end; if `again`, resume it."""
    began = time.monotonic()
    job_started = start(command, env)
    ready = wait(
        lambda: job_started.has_begun(BEGUN[job]) or job_started.process.poll() is not None, START_S
    )
    row: dict[str, Any] = {"job": job, "way": way, "ready_s": round(time.monotonic() - began, 1)}
    if ready is None or job_started.process.poll() is not None:
        row |= {"code": job_started.process.poll(), "error": "".join(job_started.stderr)[-2000:]}
        finish(job_started)
        return {**row, "good": False}
    stream = Stream(job_started, job)
    sent = time.monotonic()
    send(job_started, way)
    code_s = wait(lambda: job_started.process.poll() is not None, 90)
    gone_s = wait(lambda: not job_started.alive(), 30)
    row["left"] = sorted(job_started.alive().values())
    row["code"], row["exit_s"] = job_started.process.poll(), code_s and round(code_s, 1)
    row["gone_s"] = None if gone_s is None or code_s is None else round(code_s + gone_s, 1)
    row["traceback"] = job_started.has_printed("Traceback")
    row["said"] = [line.strip()[:300] for line in job_started.stderr[-6:]]
    row["stream"] = stream.outcome()
    if stream.ended:
        row["stream_s"] = round(stream.ended - sent, 1)
    finish(job_started)
    row["good"] = (
        row["code"] in wanted_codes(job, way)
        and row["gone_s"] is not None
        and row["gone_s"] <= LIMIT_S
        and not row["traceback"]
    )
    if again and job != "serve":
        resumed = subprocess.run(
            command, env={**os.environ, **env}, capture_output=True, text=True, timeout=400
        )
        row["resumed"] = resumed.returncode == 0
        row["good"] = row["good"] and row["resumed"]
        if resumed.returncode:
            row["again"] = resumed.stderr[-2000:]
    return row


def wanted_codes(job: str, way: str) -> tuple[int, ...]:
    """The exit codes that are right; an endpoint that has answered all requests exits with 0."""
    how, _, what = way.partition("-")
    code = CODES[how if how == "kill" else what]
    if job == "serve" and what == "TERM":
        return (0, code) if how == "twice" else (0,)
    return (code,)


def finish(started: Started) -> None:
    """Kill the processes that are left."""
    for pid in started.alive():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    started.process.wait(30)


class Stream:
    """A streamed answer that is in progress while the endpoint is stopped."""

    def __init__(self, started: Started, job: str) -> None:
        self._lines: list[str] = []
        self._thread: threading.Thread | None = None
        self.ended: float | None = None
        if job == "serve":
            url = json.loads(started.stdout[0])["url"]
            self._thread = threading.Thread(target=self._read, args=(url,), daemon=True)
            self._thread.start()
            wait(lambda: len(self._lines) > 10, 30)

    def _read(self, url: str) -> None:
        body = {"prompt": "the cat", "max_tokens": 100, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                self._lines.extend(line.decode().strip() for line in answer if line.strip())
        except OSError as error:
            self._lines.append(f"{error}")
        self.ended = time.monotonic()

    def outcome(self) -> str | None:
        if self._thread is None:
            return None
        self._thread.join(30)
        return "whole" if self._lines and self._lines[-1] == "data: [DONE]" else "cut"


def commands(folder: Path) -> dict[str, Callable[[int], list[str]]]:
    """For each job, a function from a round's number, which makes names unique, to the command."""
    text = folder / "text.txt"
    text.write_text(tiny_text(3000), "utf-8")
    large = folder / "large.txt"
    large.write_text(tiny_text(40_000) * 8, "utf-8")
    model = folder / "tiny" / "model"
    make_tiny_model(model, n_positions=512, n_layer=4, n_embd=192, n_head=4)
    prompts = folder / "prompts.txt"
    prompts.write_text("the cat sat\n" * 400, "utf-8")
    tiny = [
        *(*TRAINED, "train.log_interval=1", "train.patience=null"),
        *("train.max_steps=300", "train.eval_interval=10", "optim.warmup_steps=2"),
    ]
    space = folder / "space.yaml"
    space.write_text(
        "tune:\n  num_samples: 3\n  replicates: 0\n  space:\n"
        "    - {path: model.dropout, uniform: [0, 0.3]}\n",
        "utf-8",
    )

    def job(name: str, *words: str) -> list[str]:
        return job_command(name, f"storage_path={folder}", *words)

    source = f"data.source={text}"
    return {
        "train": lambda n: job("train", f"name=train{n}", source, *tiny),
        "tune": lambda n: job("tune", f"--config={space}", f"name=tune{n}", source, *tiny),
        "prepare": lambda n: job(
            "prepare", f"data.source={large}", f"data.vocab_size={2000 + n}", f"name=prepare{n}"
        ),
        "evaluate": lambda n: job(
            *("evaluate", f"evaluate.model={model}", f"evaluate.source={text}"),
            *(f"name=evaluate{n}", "evaluate.passages=20", "evaluate.stride=16"),
        ),
        "generate": lambda n: job(
            *("generate", f"generate.model={model}", f"generate.input_path={prompts}"),
            *(f"generate.output_path={folder}/out{n}", "sample.max_new_tokens=200"),
            *("generate.backend=torch", "sample.min_new_tokens=200"),
        ),
        "serve": lambda n: job("serve", f"serve.model={model.parent}", f"serve.port={free_port()}"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=list(BEGUN), default=list(BEGUN))
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, *DEATHS], default=list(WAYS))
    parser.add_argument("--once", action="store_true", help="do not resume the jobs")
    arguments = parser.parse_args()
    # A shell starts background jobs with SIGINT ignored, which the jobs here must not inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rows = []
    with tempfile.TemporaryDirectory(prefix="gptray-stop-") as name:
        started = commands(Path(name))
        env = {"HOME": name, "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", f"{name}/cache")}
        for job in arguments.jobs:
            for number, way in enumerate(arguments.ways):
                rows.append(stop(started[job](number), job, way, env, again=not arguments.once))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(f"{'job':9} {'way':20} {'exit':>4} {'s to exit':>9} {'s to none':>9} resumed good")
    for row in rows:
        print(
            f"{row['job']:9} {row['way']:20} {row['code']!s:>4} {row.get('exit_s')!s:>9} "
            f"{row.get('gone_s')!s:>9} {row.get('resumed', row.get('stream'))!s:7} {row['good']}"
        )
    good = sum(row["good"] for row in rows)
    print(json.dumps({"stops": len(rows), "good": good}))
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
