"""RAY_ADDRESS: whether a Ray listens there. Ray itself asks for minutes before it gives up."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from gptray.config import UserError

WAIT_S = 3.0
_CLIENT_PORT = 10001


def check_address(address: str) -> None:
    """Refuse an address at which nothing listens. Raises UserError, which names RAY_ADDRESS."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={address}: is a dashboard's address, for ray job submit; a job that is "
            "started by itself takes HOST:6379, or no RAY_ADDRESS for a Ray of its own"
        )
    place = _running_here() if address == "auto" else address
    if place is None or address == "local":
        return  # Ray says at once what it finds
    host, _, port = place.removeprefix("ray://").rpartition(":")
    if not host and place.startswith("ray://"):
        host, port = port, str(_CLIENT_PORT)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=WAIT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        found = f" ({place})" if address == "auto" else ""
        raise UserError(
            f"RAY_ADDRESS={address}{found}: no Ray answers there: {reason}; start it with ray "
            "start --head, or unset RAY_ADDRESS to have the job start its own"
        ) from None


def _running_here() -> str | None:
    """The address of the Ray that was last started on this machine, where one was."""
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"
    try:
        return (folder / "ray_current_cluster").read_text("utf-8").strip() or None
    except OSError:
        return None
