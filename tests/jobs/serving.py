"""jobs/serve.py as a process: what it told, what it answers, what it started."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from gptray.generation.engine import Engine
from gptray.generation.sequence import Sequence
from gptray.generation.settings import Sampling
from gptray.model.hf import save_pretrained
from tests.generation.models import random_gpt, small_tokenizer

JOB = Path(__file__).resolve().parents[2] / "jobs" / "serve.py"
TOKENIZER = small_tokenizer()
MODEL = random_gpt(TOKENIZER, n_positions=1024, n_layer=6, n_embd=192, n_head=4)
PROMPT = "the cat"


def save_model(runs: Path) -> Path:
    """The model as a run `tiny` has it."""
    folder = runs / "tiny" / "model"
    save_pretrained(MODEL, folder, eos_token_id=TOKENIZER.eos_id)
    TOKENIZER.save(folder)
    return folder


@dataclass
class Job:
    """jobs/serve.py as it runs."""

    process: subprocess.Popen[str]
    url: str
    model: str

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def processes(self) -> dict[int, str]:
        """Everything that it has started, by process id."""
        parents, names = {}, {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                names[pid] = (entry / "cmdline").read_text().replace("\0", " ").strip()
                parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return {pid: names[pid] for pid in found if names[pid]}

    def metric(self, name: str) -> dict[str, float]:
        """A metric of each replica."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        found = [line.split() for line in lines if line.startswith(f"{name}{{")]
        return {label: float(value) for label, value in found}

    def replicas(self) -> list[int]:
        """Process ids of the engines' processes."""
        return [pid for pid, name in self.processes().items() if "ServeReplica" in name]

    def ask(self, tokens: int) -> httpx.Response:
        return self.post(prompt=PROMPT, max_tokens=tokens, ignore_eos=True, seed=3)


def expected(tokens: int) -> str:
    """What the engine writes for `Job.ask`, asked directly."""
    sampling = Sampling(max_new_tokens=tokens, ignore_eos=True, seed=3)
    engine = Engine(MODEL, TOKENIZER, max_batch_size=1)
    return engine.run([Sequence(TOKENIZER.encode(PROMPT), sampling)])[0].text


@contextmanager
def job_running(folder: Path, *settings: str) -> Iterator[Job]:
    """The job on a free port, killed at the end if it still runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(JOB), f"serve.model={folder.parent}", f"serve.port={port}"]
        + ["generate.backend=torch", "generate.precision=fp32", "serve.drain_timeout_s=120"]
        + [*settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as a terminal would: what Ctrl-C reaches
    )
    assert process.stdout and process.stderr
    told = process.stdout.readline()
    assert told, process.stderr.read()
    try:
        yield Job(process, **json.loads(told))
    finally:
        process.kill()
        process.communicate()
