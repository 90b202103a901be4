"""A RAY_ADDRESS at which no Ray listens: told before Ray asks for minutes."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from gptray.config import UserError
from gptray.jobs.cluster.connection import check_address


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
def test_an_address_where_nothing_listens_is_one_sentence(closed_port: int, form: str) -> None:
    address = form.format(closed_port)
    with pytest.raises(UserError, match="no Ray answers there: .*unset RAY_ADDRESS") as told:
        check_address(address)
    assert str(told.value).startswith(f"RAY_ADDRESS={address}: ") and "\n" not in str(told.value)


@pytest.mark.parametrize("address", ["somewhere", "127.0.0.1:many", ":", ":6379", "ray://"])
def test_what_is_no_address_is_told_too(address: str) -> None:
    with pytest.raises(UserError, match="is not HOST:PORT, such as 127.0.0.1:6379"):
        check_address(address)


def test_a_port_beyond_all_ports_has_no_ray() -> None:
    with pytest.raises(UserError, match="no Ray answers there"):
        check_address("127.0.0.1:99999999999")


def test_a_dashboards_address_says_what_it_is_for() -> None:
    with pytest.raises(UserError, match="for ray job submit"):
        check_address("http://127.0.0.1:8265")


def test_auto_is_the_ray_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    check_address("auto")  # none was started, which Ray says itself
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{closed_port}")
    with pytest.raises(UserError, match=rf"RAY_ADDRESS=auto \(127.0.0.1:{closed_port}\): no Ray"):
        check_address("auto")


@pytest.mark.parametrize("answer", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_what_listens_and_is_not_ray_is_told(
    answer: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptray.jobs.cluster.connection.ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        place = f"127.0.0.1:{listening.getsockname()[1]}"

        def reply() -> None:
            connection, _ = listening.accept()
            with connection:
                assert answer is not None
                connection.sendall(answer)
                connection.recv(64)

        if answer is not None:  # None: it never says a word
            threading.Thread(target=reply, daemon=True).start()
        with pytest.raises(
            UserError, match="no Ray answers there: (whatever is listening|timed out)"
        ):
            check_address(place)


def test_a_ray_is_let_pass(ray_cluster: None) -> None:
    import ray

    check_address(ray.get_runtime_context().gcs_address)
