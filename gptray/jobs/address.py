"""Checks that a Ray listens at RAY_ADDRESS. Ray itself would retry for minutes."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from gptray.config import UserError

WAIT_S = 3.0
_CLIENT_PORT = 10001
# HTTP/2: a client's preface with an empty SETTINGS frame, and the type of such a frame.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = b"\x04"


def check_address(address: str) -> None:
    """Refuse an address at which no Ray listens. Raises UserError, which names RAY_ADDRESS."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={address} is a dashboard's address, for ray job submit; to start a job "
            "directly use HOST:6379, or unset RAY_ADDRESS to have the job start its own Ray"
        )
    place = _running_here() if address == "auto" else address
    if place is None or address == "local":
        return  # Ray itself answers at once
    host, _, port = place.removeprefix("ray://").rpartition(":")
    if not host and place.startswith("ray://"):
        host, port = port, str(_CLIENT_PORT)
    if not host or not port.isdecimal():
        raise UserError(f"RAY_ADDRESS={address}: is not HOST:PORT, such as 127.0.0.1:6379, or auto")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=WAIT_S) as connection:
            _speak(connection)
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        found = f" ({place})" if address == "auto" else ""
        raise UserError(
            f"RAY_ADDRESS={address}{found}: no Ray answers there: {reason}; start one with ray "
            "start --head, or unset RAY_ADDRESS to have the job start its own Ray"
        ) from None


def _speak(connection: socket.socket) -> None:
    """Greet like a gRPC client, as Ray uses gRPC. Raises OSError if the answer is not gRPC's."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # then it answers only within TLS
    connection.sendall(_PREFACE)
    answer = connection.recv(9)
    if answer[3:4] != _SETTINGS:
        raise ConnectionError("what listens there is not Ray")


def _running_here() -> str | None:
    """The address of the Ray that was last started on this machine, if any."""
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"
    try:
        return (folder / "ray_current_cluster").read_text("utf-8").strip() or None
    except OSError:
        return None
