"""The endpoint on Ray Serve when it is treated badly: for minutes, so only when asked for."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.jobs.serving import PROMPT, TOKENIZER, Job, expected, job_running, save_model
from tests.serving.requests import fuzzed

pytestmark = [pytest.mark.chaos, pytest.mark.ray]
SLOTS, OVERLOAD_S = 4, 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def job(folder: Path) -> Iterator[Job]:
    with job_running(folder, f"serve.max_batch_size={SLOTS}", f"serve.max_waiting={SLOTS}") as job:
        yield job


def side_by_side(clients: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def memory(job: Job) -> int:
    """Resident bytes of the replica and of Serve's proxy."""
    pids = [pid for pid, name in job.processes().items() if "Replica" in name or "Proxy" in name]
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def test_five_thousand_fuzzed_requests(job: Job) -> None:
    codes: Counter[int] = Counter()
    with httpx.Client(base_url=job.url, timeout=60) as client:
        for body in fuzzed(5000, seed=1, vocab_size=TOKENIZER.vocab_size):
            kind = {"content-type": "application/json"}
            answer = client.post("/v1/completions", content=body, headers=kind)
            codes[answer.status_code] += 1
            assert answer.status_code < 500, (body[:300], answer.text)
            if answer.status_code != 200:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    print(dict(codes))
    assert job.ask(20).json()["choices"][0]["text"] == expected(20)


def test_ten_times_more_than_it_can_take(job: Job) -> None:
    def load(clients: int, seconds: float) -> tuple[Counter[int], float, float]:
        """Status codes, tokens per second of what was accepted, sequences in a step."""
        codes: Counter[int] = Counter()
        names = ("gptray_steps_total", "gptray_step_sequences_total")
        steps, sequences = (sum(job.metric(name).values()) for name in names)
        end = time.monotonic() + seconds

        def client(_: int) -> None:
            with httpx.Client(base_url=job.url, timeout=60) as http:
                while time.monotonic() < end:
                    body = {"prompt": PROMPT, "max_tokens": 50, "ignore_eos": True}
                    answer = http.post("/v1/completions", json=body)
                    codes[answer.status_code] += 1
                    if answer.status_code == 429:
                        time.sleep(int(answer.headers["retry-after"]))

        side_by_side(clients, client)
        more_steps, more = (sum(job.metric(name).values()) for name in names)
        return codes, 50 * codes[200] / seconds, (more - sequences) / (more_steps - steps)

    load(SLOTS, 5.0)
    _, peak, _ = load(2 * SLOTS, 15.0)
    before = memory(job)
    codes, accepted, in_a_step = load(10 * 2 * SLOTS, OVERLOAD_S)
    grown = memory(job) / before
    # Clients and server share the cores: how fast a step is says less than how full.
    print(f"{dict(codes)}, {accepted:.0f} tokens/s, peak {peak:.0f}, {in_a_step:.2f} in a step")
    assert set(codes) == {200, 429}
    assert in_a_step > 0.95 * SLOTS and grown < 1.2
    assert job.ask(20).json()["choices"][0]["text"] == expected(20)


def test_five_hundred_clients_that_go_away(job: Job) -> None:
    draw = random.Random(0)
    moments = [draw.expovariate(10.0) for _ in range(500)]

    def client(number: int) -> None:
        for moment in moments[number::10]:
            body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True}
            body["stream"] = moment < 0.1
            timeout = httpx.Timeout(60, read=moment)
            try:
                with httpx.stream("POST", f"{job.url}/v1/completions", json=body, timeout=timeout):
                    pass
            except httpx.ReadTimeout:
                pass

    side_by_side(10, client)
    deadline = time.monotonic() + 10
    names = ("gptray_sequences_running", "gptray_sequences_waiting")
    while any(sum(job.metric(name).values()) for name in names):
        assert time.monotonic() < deadline, "slots are still taken"
    assert job.ask(20).json()["choices"][0]["text"] == expected(20)


def test_a_killed_replica_comes_back_and_no_wrong_text_is_given(job: Job) -> None:
    texts: set[str] = set()
    codes: Counter[int] = Counter()
    stop = threading.Event()
    back = threading.Event()
    killed = threading.Event()

    def client(_: int) -> None:
        while not stop.is_set():
            was_killed = killed.is_set()
            answer = job.ask(60)
            codes[answer.status_code] += 1
            if answer.status_code == 200:
                texts.add(answer.json()["choices"][0]["text"])
                if was_killed:
                    back.set()

    clients = [threading.Thread(target=client, args=(number,)) for number in range(3)]
    for thread in clients:
        thread.start()
    while codes[200] < 10:
        pass
    began = time.monotonic()
    os.kill(job.replicas()[0], signal.SIGKILL)
    killed.set()
    assert back.wait(60)
    print(f"back after {time.monotonic() - began:.1f} s, {dict(codes)}")
    stop.set()
    for thread in clients:
        thread.join()
    assert texts == {expected(60)}


def test_a_second_engine_comes_under_load_and_takes_its_part(folder: Path) -> None:
    settings = ["serve.max_replicas=2", "serve.max_batch_size=2", "compute.cpus_per_worker=1"]
    with job_running(folder, *settings) as job:
        answers: list[httpx.Response] = []
        shared = threading.Event()

        def client(_: int) -> None:
            while not shared.is_set():
                answers.append(job.ask(60))

        def watch() -> None:
            end = time.monotonic() + 180
            while time.monotonic() < end and not shared.wait(1):
                made = job.metric("gptray_output_tokens_total").values()
                if len(made) == 2 and min(made) >= 60:
                    break
            shared.set()

        assert len(job.replicas()) == 1
        watcher = threading.Thread(target=watch)
        watcher.start()
        side_by_side(12, client)
        watcher.join()
        made = job.metric("gptray_output_tokens_total").values()
        assert len(job.replicas()) == len(made) == 2 and min(made) > 0
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {expected(60)}


def test_ctrl_c_lets_a_stream_finish(job: Job) -> None:
    body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{job.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.killpg(job.process.pid, signal.SIGINT)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    _, said = job.process.communicate(timeout=60)
    assert job.process.returncode == 130
    assert "interrupted" in said and "Traceback" not in said
