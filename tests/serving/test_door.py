"""Who gets in: names of the endpoint, keys that change, bodies that never come."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from gptray.config import ConfigError, load_config
from gptray.serving import api_keys
from gptray.serving.api_keys import Keys, read_keys
from gptray.serving.hosts import Hosts
from tests.serving.servers import Server, running

HALF = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Content-Length: 100\r\n\r\n{"prompt'
)
DEADLINE_S = 20.0


@contextmanager
def half_sent(server: Server, count: int) -> Iterator[list[socket.socket]]:
    """Connections on which half a request's body has been sent."""
    with ExitStack() as open_ones:
        connections = [open_ones.enter_context(server.connect()) for _ in range(count)]
        for connection in connections:
            connection.sendall(HALF)
        yield connections


def test_a_body_that_does_not_arrive_in_time_is_answered_and_its_connection_ends() -> None:
    with running(body_timeout_s=0.2) as server, half_sent(server, 1) as (connection,):
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer.lower()
    assert b"the body did not arrive within 0.2 s (serve.body_timeout_s)" in answer


def test_half_sent_bodies_take_nobodys_place() -> None:
    with running(max_batch_size=1, max_waiting=1) as server, half_sent(server, 300):
        assert server.get("/health").status_code == 200
        assert server.post(prompt="the cat", max_tokens=3).status_code == 200


def test_large_bodies_on_their_way_are_limited_and_small_ones_pass() -> None:
    with running(max_body_bytes=30_000) as server, ExitStack() as open_ones:
        connections = [open_ones.enter_context(server.connect()) for _ in range(80)]
        for connection in connections:
            connection.sendall(HALF.replace(b": 100", b": 29999") + b"x" * 29_000)
        refused, _, _ = select.select(connections, [], [], DEADLINE_S)
        answer = b"".join(iter(lambda: refused[0].recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 503") and b"too many large bodies" in answer
        assert server.post(prompt="the cat", max_tokens=3).status_code == 200
        assert 0 < len(refused) < len(connections)


@pytest.mark.parametrize(
    ("host", "allowed", "header", "included"),
    [
        ("127.0.0.1", None, "localhost:8000", True),
        ("127.0.0.1", None, "LOCALHOST", True),
        ("127.0.0.1", None, "page.localhost:8000", True),
        ("127.0.0.1", None, "127.0.0.1:8000", True),
        ("127.0.0.1", None, "[::1]:8000", True),
        ("127.0.0.1", None, "[::1]", True),
        ("127.0.0.1", None, "10.1.2.3:8000", True),  # a probe's
        ("127.0.0.1", None, socket.gethostname(), True),
        ("127.0.0.1", None, "", True),
        ("127.0.0.1", None, "evil.example:8000", False),
        ("127.0.0.1", None, "127.0.0.1.evil.example", False),
        ("127.0.0.1", None, "localhost.evil.example", False),
        ("127.0.0.1", None, "evil.example:[::1]", False),
        ("127.0.0.1", None, "evil.example:127.0.0.1", False),
        ("gpu.example", None, "gpu.example:8000", True),
        ("gpu.example", None, "other.example:8000", False),
        ("0.0.0.0", None, "any.example", True),
        ("::", None, "any.example", True),
        ("0.0.0.0", "api.example.com", "api.example.com", True),
        ("0.0.0.0", "api.example.com", "evil.example", False),
        ("127.0.0.1", ["*.example.com", "b.org"], "a.example.com.", True),
        ("127.0.0.1", ["*.example.com", "b.org"], "B.org:443", True),
        ("127.0.0.1", ["*.example.com", "b.org"], "example.com", False),
        ("127.0.0.1", ["*.example.com", "b.org"], "evilexample.com", False),
        ("127.0.0.1", "*", "evil.example", True),
        ("127.0.0.1", "api.\uc608\uc2dc.kr", "api.xn--vv4b11d.kr:443", True),
        ("127.0.0.1", "*.\uc608\uc2dc.kr", "api.xn--vv4b11d.kr", True),
    ],
)
def test_a_host_is_the_endpoints_own_or_an_allowed_one(
    host: str, allowed: str | list[str] | None, header: str, included: bool
) -> None:
    assert Hosts(host, allowed).include(header) is included


def test_another_host_is_refused_on_every_path_in_one_sentence() -> None:
    with running() as server:
        for path in ("/", "/health", "/v1/models", "/metrics", "/nowhere"):
            assert server.get(path, host="evil.example:8000").status_code == 421
            assert server.get(path, host="localhost:8000").status_code != 421
        refused = server.get("/v1/models", host="evil.example:8000").json()["error"]["message"]
    assert refused == "the Host 'evil.example:8000' is not allowed here; see serve.allowed_hosts"


@pytest.mark.parametrize("name", ["https://a.example", "a.example:8000", "a.example/v1", "", "a b"])
def test_an_allowed_host_is_a_name_and_no_more(name: str) -> None:
    with pytest.raises(ConfigError, match="without scheme, port or path"):
        load_config(None, [f"serve.allowed_hosts=['{name}']"])
    allowed = load_config(None, ["serve.allowed_hosts=['a.example', '*.b.example', '*']"])
    assert allowed.serve.allowed_hosts == ["a.example", "*.b.example", "*"]


@pytest.mark.parametrize(
    "origin", ["example.com", "https://a.example/", "https://A.example", "https://*.a.example", ""]
)
def test_an_allowed_origin_is_what_a_browser_sends(origin: str) -> None:
    with pytest.raises(ConfigError, match="as browsers send them"):
        load_config(None, [f"serve.allowed_origins=['{origin}']"])
    with pytest.raises(ConfigError) as one:
        load_config(None, [f"serve.allowed_origins='{origin}'"])
    assert str(one.value).count(repr(origin)) == 1
    sent = ["https://a.example", "http://localhost:3000", "app://obsidian.md", "null", "*"]
    assert load_config(None, [f"serve.allowed_origins={sent}"]).serve.allowed_origins == sent


@pytest.fixture
def quick_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not have the test wait a second for every change of a key file."""
    monkeypatch.setattr(api_keys, "CHECK_S", 0.05)


def until_accepted(keys: Keys, key: str, wanted: bool) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while keys.accept(f"Bearer {key}") is not wanted:
        assert time.monotonic() < deadline


def test_changed_keys_count_without_a_restart(
    quick_look: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    for file, text in ((path, "first\n"), (tmp_path / "new", "third\n")):
        file.write_text(text)
        file.chmod(0o600)
    keys = Keys(str(path), read_keys(str(path)))
    assert keys.accept("Bearer first") and not keys.accept("Bearer second")
    path.write_text("second\n")
    until_accepted(keys, "second", True)
    assert not keys.accept("Bearer first")
    (tmp_path / "new").replace(path)
    until_accepted(keys, "third", True)
    assert not caplog.records


def test_a_key_file_that_is_gone_or_wrong_leaves_the_keys_in_use_and_is_told_once(
    quick_look: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, path = tmp_path / "..data", tmp_path / "keys"
    for name, text in (("one", "first\n"), ("two", "two keys\n"), ("three", "third\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(text)
        (tmp_path / name / "keys").chmod(0o600)
    data.symlink_to("one")  # as Kubernetes mounts a secret: a link to a folder, swapped whole
    path.symlink_to("..data/keys")
    keys = Keys(str(path), read_keys(str(path)))
    assert keys.accept("Bearer first")

    def swapped(target: str) -> None:
        (tmp_path / "..tmp").symlink_to(target)
        (tmp_path / "..tmp").replace(data)

    swapped("two")
    deadline = time.monotonic() + DEADLINE_S
    while not caplog.records:
        assert keys.accept("Bearer first") and time.monotonic() < deadline
    assert "line 1: a key must be printable ASCII" in caplog.text
    assert "the previous keys stay in use" in caplog.text
    (tmp_path / "two" / "keys").unlink()
    while len(caplog.records) < 2:
        assert keys.accept("Bearer first") and time.monotonic() < deadline
    assert "No such file" in caplog.records[1].getMessage()
    swapped("three")
    until_accepted(keys, "third", True)
    assert not keys.accept("Bearer first") and len(caplog.records) == 2


def test_keys_that_change_open_a_running_server(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("first\n")
    path.chmod(0o600)
    with running(keys=Keys(str(path), read_keys(str(path)))) as server:
        path.write_text("second\n")
        deadline = time.monotonic() + DEADLINE_S
        with httpx.Client(base_url=server.url) as client:
            asked = {"Authorization": "Bearer second"}
            while client.get("/v1/models", headers=asked).status_code != 200:
                assert time.monotonic() < deadline
