"""The endpoint on Ray Serve: the door as a user opens it, a killed replica, a stop in full flow."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from gptray.config import UserError, load_config
from gptray.generation.engine import Engine
from gptray.generation.request import Request
from gptray.generation.settings import Sampling
from gptray.model.hf import save_pretrained
from gptray.runners.serve import check_endpoint, serving_plan
from tests.generation.models import random_gpt, small_tokenizer

JOB = Path(__file__).resolve().parents[2] / "jobs" / "serve.py"
TOKENIZER = small_tokenizer()
MODEL = random_gpt(TOKENIZER, n_positions=1024)
PROMPT, LONG = "the cat", 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny" / "model"
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


@pytest.fixture(scope="module")
def job(folder: Path) -> Iterator[Job]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(JOB), f"serve.model={folder.parent}", f"serve.port={port}"]
        + ["generate.backend=torch", "generate.precision=fp32"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    told = process.stdout.readline()
    assert told, process.stderr.read()
    yield Job(process, **json.loads(told))
    process.kill()
    process.communicate()


def expected(tokens: int) -> str:
    """What the engine writes, asked directly."""
    sampling = Sampling(max_new_tokens=tokens, ignore_eos=True, seed=3)
    engine = Engine(MODEL, TOKENIZER, max_batch_size=1)
    return engine.run([Request(TOKENIZER.encode(PROMPT), sampling)])[0].text


def ask(job: Job, tokens: int) -> httpx.Response:
    return job.post(prompt=PROMPT, max_tokens=tokens, ignore_eos=True, seed=3)


def test_the_job_tells_its_url_and_answers_there(job: Job) -> None:
    assert job.model == "tiny" and job.url.startswith("http://127.0.0.1:")
    answer = ask(job, 20).json()
    assert answer["choices"][0]["text"] == expected(20) and answer["model"] == "tiny"
    assert httpx.get(f"{job.url}/health", timeout=60).status_code == 200
    wrong = job.post(prompt=PROMPT, max_tokns=3)
    assert wrong.status_code == 400 and "did you mean max_tokens?" in wrong.text


@pytest.mark.chaos
def test_a_killed_replica_comes_back_and_no_wrong_text_is_given(job: Job) -> None:
    texts: set[str] = set()
    codes: list[int] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            answer = ask(job, 60)
            codes.append(answer.status_code)
            if answer.status_code == 200:
                texts.add(answer.json()["choices"][0]["text"])

    clients = [threading.Thread(target=load) for _ in range(3)]
    for client in clients:
        client.start()
    before = [pid for pid, name in job.processes().items() if "ServeReplica" in name]
    assert len(before) == 1
    while not codes:
        pass
    os.kill(before[0], signal.SIGKILL)
    after = before
    while after == before or not after:
        after = [pid for pid, name in job.processes().items() if "ServeReplica" in name]
    seen = len(codes)
    while 200 not in codes[seen + len(clients) :]:
        pass
    stop.set()
    for client in clients:
        client.join()
    assert texts == {expected(60)}


def test_sigterm_lets_streams_finish_refuses_new_requests_and_leaves_nothing(job: Job) -> None:
    body = {"prompt": PROMPT, "max_tokens": LONG, "ignore_eos": True, "seed": 3, "stream": True}
    texts: list[str] = []
    begun = threading.Semaphore(0)

    def read() -> None:
        with httpx.stream("POST", f"{job.url}/v1/completions", json=body, timeout=60) as answer:
            text = ""
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    begun.release()
            texts.append(text)

    clients = [threading.Thread(target=read) for _ in range(4)]
    for client in clients:
        client.start()
    for _ in range(40):
        begun.acquire()
    processes = job.processes()
    job.process.send_signal(signal.SIGTERM)
    answer = ask(job, 1)
    while answer.status_code == 200:
        answer = ask(job, 1)
    assert answer.status_code == 503 and "stopping" in answer.json()["error"]["message"]
    assert not texts
    for client in clients:
        client.join()
    assert set(texts) == {expected(LONG)} and len(texts) == len(clients)
    rest, said = job.process.communicate(timeout=60)
    assert job.process.returncode == 0, said
    assert rest == "" and "Traceback" not in said and PROMPT not in said
    assert [name for pid, name in processes.items() if Path(f"/proc/{pid}/cmdline").is_file()
            and Path(f"/proc/{pid}/cmdline").read_text()] == []  # fmt: skip


def test_every_mistake_is_told_before_ray_starts(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "keys").write_text("\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wrong = [
            f"serve.model={tmp_path}/nowhere",
            f"serve.port={port}",
            f"serve.api_key_file={tmp_path}/keys",
        ]
        with pytest.raises(UserError) as told:
            check_endpoint(load_config(None, wrong))
    assert "serve.model" in str(told.value) and "no such folder" in str(told.value)
    assert f"serve.port={port} cannot be listened on" in str(told.value)
    assert "serve.api_key_file" in str(told.value) and "no key" in str(told.value)
    for argument, message in (
        ("serve.host=nowhere.invalid", "no such address"),
        (f"serve.api_key_file={tmp_path}/nothing", "No such file"),
        ("serve.max_output_tokens=1025", "context of 1024"),
    ):
        with pytest.raises(UserError, match=message):
            check_endpoint(load_config(None, [f"serve.model={folder}", argument]))


def test_the_plan_names_model_and_url(folder: Path) -> None:
    plan = dict(serving_plan(load_config(None, [f"serve.model={folder}", "serve.host=0.0.0.0"])))
    assert plan["model"].endswith("called tiny") and plan["url"] == "http://127.0.0.1:8000"
