"""What stands before Serve's proxy, with applications that answer as Serve does in its place."""

from __future__ import annotations

import json
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from gptray.config import ServeConfig
from gptray.jobs.serve.body_limits import environment
from gptray.jobs.serve.proxy import Front, TimedConnection, middlewares
from gptray.serving.arrival import Arrival

GONE = "the engine ended before the answer was complete; try again"


MUCH = b"x" * (1 << 17)


class Impatient(TimedConnection):
    headers_s, headers_bytes, unread_s = 0.2, 1000, 0.2


@contextmanager
def listening(app: ASGIApp, arrival: Arrival | None = None) -> Iterator[tuple[str, int]]:
    config = uvicorn.Config(
        Front(app, arrival=arrival), http=Impatient, lifespan="off", log_level="critical"
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as own:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [own]})
        thread.start()
        try:
            yield own.getsockname()
        finally:
            server.should_exit = True
            thread.join()


def start(status: int, kind: str, **headers: str) -> dict[str, Any]:
    given = {"content-type": kind, **headers}
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}


def answering(*messages: dict[str, Any]) -> Callable[[Scope, Receive, Send], Any]:
    """An application that sends these messages and returns, whatever is missing."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


async def tells_path(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start(200, "text/plain"))
    await send({"type": "http.response.body", "body": scope["path"].encode()})


def body(text: str, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


def sent(address: tuple[str, int], data: bytes) -> bytes:
    """What comes back until the server ends the connection."""
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(4096), b""))


@pytest.mark.parametrize(
    ("messages", "status", "message"),
    [
        ([], 503, GONE),
        ([start(503, "text/plain"), body("Deployment 'Replica' is unavailable")], 503, "no engine"),
        ([start(404, "text/plain"), body("Ping http://.../-/routes")], 404, "no model is served"),
        ([start(408, "text/plain"), body("Request 7 timed out")], 408, "serve.request_timeout_s"),
    ],
)
def test_serves_own_answers_come_in_openais_form(
    messages: list[dict[str, Any]], status: int, message: str
) -> None:
    with listening(answering(*messages)) as (host, port):
        answer = httpx.get(f"http://{host}:{port}/v1/models")
    assert answer.status_code == status and message in answer.json()["error"]["message"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_full_queue_keeps_its_retry_after() -> None:
    full = start(429, "text/plain", **{"retry-after": "10"}), body("queue is full")
    with listening(answering(*full)) as (host, port):
        answer = httpx.get(f"http://{host}:{port}/")
    assert answer.status_code == 429 and answer.headers["retry-after"] == "10"
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_a_stream_that_breaks_off_ends_with_an_error() -> None:
    broken = start(200, "text/event-stream"), body('data: {"choices": []}\n\n', more=True)
    with listening(answering(*broken)) as (host, port):
        events = httpx.get(f"http://{host}:{port}/").text.split("\n\n")
    assert events[0] == 'data: {"choices": []}' and events[2:] == [""]
    assert json.loads(events[1].removeprefix("data: "))["error"]["message"] == GONE


def test_other_answers_pass_as_they_are_and_serves_own_paths_are_the_applications() -> None:
    with listening(tells_path) as (host, port):
        for path, seen in (
            ("/-/routes", "/-/routes/"),
            ("/-/healthz", "/-/healthz/"),
            ("/v1/models", "/v1/models"),
        ):
            answer = httpx.get(f"http://{host}:{port}{path}")
            assert (answer.status_code, answer.text) == (200, seen)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x", b"408 Request Timeout"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 2000, b"431 Request Header Fields"),
        (b"GET / HTTP/1.1\r\n\r\nGET / HT", b"408 Request Timeout"),
        (b"nonsense\r\n\r\n", b"400 Bad Request"),
    ],
)
def test_headers_must_come_in_time_and_be_short(data: bytes, status: bytes) -> None:
    with listening(tells_path) as address:
        answer = sent(address, data)
        assert b"HTTP/1.1 " + status in answer and b"connection: close" in answer
        assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["message"]
        assert sent(address, b"") == b""  # who says nothing is told nothing
        answer_to_long = httpx.post(f"http://127.0.0.1:{address[1]}/", content=b"x" * 100_000)
        assert answer_to_long.status_code == 200


def test_an_answer_that_nobody_reads_ends_and_one_that_is_read_arrives_whole() -> None:
    ended = threading.Event()

    async def much(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send(start(200, "text/plain"))
            for _ in range(300):
                await send({"type": "http.response.body", "body": MUCH, "more_body": True})
            await send({"type": "http.response.body"})
        finally:
            ended.set()

    with listening(much) as address:
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert ended.wait(20)
            came = sum(map(len, iter(lambda: connection.recv(1 << 20), b"")))
            assert came < 300 * len(MUCH)
        answer = httpx.get(f"http://127.0.0.1:{address[1]}/", timeout=60)
        assert len(answer.content) == 300 * len(MUCH)


@pytest.mark.parametrize(
    ("headers", "given", "status"),
    [
        ("Content-Length: 20", b"half", b"408 Request Timeout"),
        ("Transfer-Encoding: chunked", b"4\r\nhalf\r\n", b"408 Request Timeout"),
        ("Content-Length: 2000", b"", b"413 "),
        ("Transfer-Encoding: chunked", b"7d0\r\n" + b"x" * 2000 + b"\r\n", b"413 "),
        ("Content-Length: 4", b"whole", b"200 OK"),
        ("Transfer-Encoding: chunked", b"2\r\nwh\r\n2\r\nol\r\n0\r\n\r\n", b"200 OK"),
        ("Content-Length: 4\r\nExpect: 100-continue", b"whol", b"100 Continue"),
        ("Content-Length: 0", b"", b"200 OK"),
    ],
)
def test_the_application_sees_whole_bodies_alone(headers: str, given: bytes, status: bytes) -> None:
    seen: list[tuple[bytes, bool]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        seen.append((message["body"], message["more_body"]))
        await send(start(200, "text/plain"))
        await send({"type": "http.response.body"})
        assert (await receive())["type"] == "http.disconnect"

    head = f"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n\r\n"
    with listening(app, Arrival(1000, 0.2)) as address:
        answer = sent(address, head.encode() + given)
    assert answer.startswith(b"HTTP/1.1 " + status)
    if status.startswith(b"4"):
        assert not seen and json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["message"]
    else:
        assert seen == [(b"" if headers.endswith(": 0") else b"whol", False)]


def test_a_client_that_leaves_in_its_body_is_forgotten() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        await tells_path(scope, receive, send)

    with listening(app, Arrival(1000, 20)) as address:
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(b"POST /gone HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
        assert b"/here" in sent(address, b"GET /here HTTP/1.0\r\n\r\n")
    assert seen == ["/here"]


def test_serve_is_given_the_front_and_uvicorn_the_timed_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
    (only,) = middlewares()
    cls: object = only.cls
    assert cls is Front and only.kwargs == {"arrival": None}
    for key, value in environment(ServeConfig(body_timeout_s=0.5)).items():
        monkeypatch.setenv(key, value)
    assert isinstance(middlewares()[0].kwargs["arrival"], Arrival)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    config = uvicorn.Config(tells_path)
    config.load()
    assert config.http_protocol_class is TimedConnection
