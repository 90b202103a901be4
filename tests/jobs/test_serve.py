"""The endpoint on Ray Serve: as a user starts it, and a stop in full flow."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import signal
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import torch
import yaml

from gptray.config import Config, RunFailed, UserError, load_config, override
from gptray.jobs.serve.answering import Answering
from gptray.jobs.serve.check import USER_CONFIG, check, endpoint_url, plan
from gptray.jobs.serve.watch import why_not_started
from gptray.jobs.serve.worker import Replica
from tests.damage import deadline
from tests.jobs.serving import PROMPT, Job, expected, job_running, save_model
from tests.processes import listening

LONG = 400
HALF = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Content-Length: 100\r\n\r\n{"prompt'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def job(folder: Path) -> Iterator[Job]:
    with job_running(folder) as job:
        yield job


@pytest.mark.ray
def test_the_job_tells_its_url_and_answers_there(job: Job) -> None:
    assert job.model == "tiny" and job.url.startswith("http://127.0.0.1:")
    answer = job.ask(20).json()
    assert answer["choices"][0]["text"] == expected(20) and answer["model"] == "tiny"
    assert httpx.get(f"{job.url}/health", timeout=60).status_code == 200
    assert httpx.get(f"{job.url}/health", headers={"host": "evil.example"}).status_code == 421
    for path in ("/-/routes", "/-/healthz"):  # Serve's own
        assert httpx.get(f"{job.url}{path}").json()["error"]["type"] == "not_found_error"
    wrong = job.post(prompt=PROMPT, max_tokns=3)
    assert wrong.status_code == 400 and "did you mean max_tokens?" in wrong.text


@pytest.mark.ray
def test_more_half_sent_bodies_than_sequences_find_room_silence_nobody(job: Job) -> None:
    address = job.url.removeprefix("http://").split(":")
    with ExitStack() as open_ones:
        for _ in range(300):
            connection = socket.create_connection((address[0], int(address[1])), timeout=60)
            open_ones.enter_context(connection).sendall(HALF)
        assert httpx.get(f"{job.url}/health", timeout=60).status_code == 200
        assert job.ask(5).json()["choices"][0]["text"] == expected(5)


@pytest.mark.ray
def test_only_the_endpoint_and_one_port_of_a_replica_are_open_to_the_network(job: Job) -> None:
    pids = [pid for pid, name in job.processes().items() if "ServeReplica" not in name]
    assert {"127.0.0.1"} == {address for address, _ in listening(pids)}
    ports = [port for address, port in listening(job.replicas()) if address != "127.0.0.1"]
    assert len(ports) <= 1  # Ray Serve's own, where a token is needed


@pytest.mark.ray
def test_sigterm_to_the_group_lets_streams_finish_refuses_new_ones_and_leaves_nothing(
    job: Job,
) -> None:
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
        assert begun.acquire(timeout=60)
    processes = job.processes()
    os.killpg(job.process.pid, signal.SIGTERM)
    answer = job.ask(1)
    while answer.status_code == 200:
        answer = job.ask(1)
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


@pytest.mark.ray
def test_a_changed_model_a_killed_engine_and_one_that_cannot_start_are_each_told_in_a_line(
    tmp_path: Path,
) -> None:
    folder = save_model(tmp_path)
    with job_running(folder) as job, deadline(300):
        assert job.process.stderr
        os.utime(folder / "model.safetensors", (0, 0))
        changed = next(line for line in job.process.stderr if "have changed" in line)
        assert changed.startswith(f"warning: the files of {folder.parent} have changed. ")
        os.kill(job.replicas()[0], signal.SIGKILL)
        died = next(line for line in job.process.stderr if "process died" in line)
        assert died == (
            "warning: an engine's process died: it was killed or out of memory. "
            "Ray Serve starts another\n"
        )
        while job.ask(5).status_code != 200:  # another one has started
            pass
        weights = (folder / "model.safetensors").rename(tmp_path / "aside")
        os.kill(job.replicas()[0], signal.SIGKILL)
        failed = next(line for line in job.process.stderr if "does not start" in line)
        assert failed.startswith("error: an engine does not start, and Ray Serve keeps trying: ")
        assert failed.endswith(f"{folder}: no model.safetensors\n")
        weights.rename(folder / "model.safetensors")
        while job.ask(5).status_code != 200:
            pass
        job.process.terminate()
        rest = job.process.stderr.read()
        assert "have changed" not in rest and "process died" not in rest
        assert "does not start" not in rest


@pytest.mark.parametrize("kind", [UserError, RunFailed])
def test_our_own_errors_are_found_in_serves_message_about_a_failed_start(
    kind: type[Exception],
) -> None:
    trace = "".join(traceback.format_exception(kind("no weights in /x\nname others")))
    told = f"A replica failed to start with exception. Retrying. Error:\nray::Replica\n{trace}"
    found = why_not_started(told)
    assert type(found) is kind and str(found) == "no weights in /x\nname others"
    other = "".join(traceback.format_exception(MemoryError("no room")))
    assert str(why_not_started(f"Error:\nray::Replica\n{other}")) == "MemoryError: no room"


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
            check(load_config(None, wrong))
    assert "serve.model" in str(told.value) and "no such folder" in str(told.value)
    assert f"serve.port={port}: cannot listen on" in str(told.value)
    assert "serve.api_key_file" in str(told.value) and "no key" in str(told.value)
    for argument, message in (
        ("serve.host=nowhere.invalid", "no such address"),
        ("serve.host=203.0.113.9", "^serve.host=203.0.113.9 is not an address of this machine$"),
        (f"serve.api_key_file={tmp_path}/nothing", "No such file"),
        ("serve.max_output_tokens=1025", "context of 1024"),
    ):
        with pytest.raises(UserError, match=message):
            check(load_config(None, [f"serve.model={folder}", argument]))


def test_the_plan_names_model_and_url(folder: Path) -> None:
    rows = dict(plan(check(load_config(None, [f"serve.model={folder}", "serve.host=0.0.0.0"]))))
    assert rows["model"].endswith("called tiny") and rows["url"] == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("::1", "http://[::1]:8000"), ("::", "http://[::1]:8000"),
        ("fe80::2", "http://[fe80::2]:8000"), ("localhost", "http://localhost:8000"),
    ],
)  # fmt: skip
def test_the_url_is_one_that_clients_read(host: str, url: str) -> None:
    assert endpoint_url(load_config(None, [f"serve.host={host}"])) == url


def test_a_model_that_fails_to_load_leaves_the_one_in_use(folder: Path) -> None:
    async def replaced() -> None:
        replica = Replica(Config(), [], torch.get_num_threads())
        app = replica.__serve_build_asgi_app__()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            async def name() -> str:
                answer = await client.get("/v1/models")
                return str(answer.json()["data"][0]["id"]) if answer.is_success else answer.text

            for wrong in ({"model": f"{folder}/nowhere"}, {"modle": f"{folder}"}, {}):
                with pytest.raises(UserError, match="user_config: "):
                    await replica.reconfigure(wrong)
            assert "no model is loaded" in await name()
            await replica.reconfigure({"model": f"{folder}"})
            assert await name() == "tiny"
            for wrong in ({"model": f"{folder}/nowhere"}, {"modle": f"{folder}"}, {}):
                await replica.reconfigure(wrong)
                assert await name() == "tiny"
            await replica.reconfigure({"model": f"{folder}", "served_model_name": "other"})
            assert await name() == "other"
            replica.check_health()

    asyncio.run(replaced())


def test_the_shipped_serve_config_names_what_there_is() -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / "serve.yaml"
    (app,) = yaml.safe_load(path.read_text())["applications"]
    module, _, name = app["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    override(Config(), app["args"])
    (deployment,) = app["deployments"]
    assert deployment["name"] == Replica.__name__
    assert set(deployment["user_config"]) == set(USER_CONFIG)


def test_a_replica_has_news_of_adapters_and_of_the_end_of_its_engine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text("{")
    keys = [f"serve.adapters={tmp_path}", "serve.max_batch_size=4", "generate.backend=torch"]

    def ended(*given: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0.")

    async def metrics() -> bytes:
        return b""

    async def news() -> list[tuple[int, str]]:
        config, threads = load_config(None, keys), torch.get_num_threads()
        answering = Answering(config, [], threads, on_first_token=lambda _: None)
        await answering.reconfigure({"model": f"{folder}", "served_model_name": "tiny"})
        transport = httpx.ASGITransport(answering.app(metrics))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            monkeypatch.setattr(torch, "softmax", ended)
            answer = await client.post("/v1/completions", json={"prompt": PROMPT})
            assert answer.status_code == 503
        return answering.news

    adapter, engine = asyncio.run(news())
    assert adapter[0] == logging.INFO and adapter[1].startswith("tiny:bad is not served: ")
    assert engine[0] == logging.ERROR and engine[1].startswith("an engine has stopped")
    assert "lower serve.max_batch_size from 4, such as serve.max_batch_size=2" in engine[1]
