"""Where Ray's processes on this machine listen for others, from /proc."""

from __future__ import annotations

import ipaddress
import os
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gptray.jobs.doctor.facts import OpenPort

# What a command line of Ray's has, and the name that people know the process by.
DASHBOARD = "dashboard"
_NAMES = (
    ("dashboard/dashboard.py", DASHBOARD),
    ("gcs_server", "gcs_server"),
    ("ray::", ""),  # its title says what it is
    ("dashboard/agent.py", "dashboard agent"),
    ("runtime_env/agent", "runtime environment agent"),
    ("raylet/raylet", "raylet"),
    ("ray.util.client.server", "client server"),
)
_LISTENS = "0A"
# Where its port is taken, the dashboard tries the next ones.
_PORT_TRIES = 50


def open_ports() -> tuple[OpenPort, ...]:
    """Every TCP port beyond loopback on which a process of Ray's listens that we may look into."""
    sockets = dict(_sockets())
    return tuple(
        sorted(
            {
                OpenPort(process_name(command, sockets[number][1]), *sockets[number])
                for command, number in _held_by_ray()
                if number in sockets
            },
            key=lambda one: (one.process, one.port),
        )
    )


def _sockets() -> Iterator[tuple[str, tuple[str, int]]]:
    """Number, address and port of the sockets that listen to more than this machine."""
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text("utf-8").splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                words, _, port = local.partition(":")
                address = address_of(words)
                if state == _LISTENS and not address.is_loopback:
                    yield rest[5], (str(address), int(port, 16))


def address_of(words: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address of the kernel's hexadecimal words, each in the machine's byte order."""
    numbers = [int(words[at : at + 8], 16) for at in range(0, len(words), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(numbers)}I", *numbers))
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _held_by_ray() -> Iterator[tuple[str, str]]:
    """Command line of the process and number of the socket, for each socket of Ray's processes."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with suppress(OSError):  # it has ended, or is another user's
            command = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            for descriptor in (entry / "fd").iterdir() if process_name(command) else ():
                with suppress(OSError):
                    for number in re.findall(r"^socket:\[(\d+)\]$", os.readlink(descriptor)):
                        yield command, number


def process_name(command: str, port: int | None = None) -> str:
    """What a process of Ray's is called, at this port of it; "" for any other process."""
    asked = re.search(r"dashboard/dashboard\.py.* --port=(\d+)", command)
    if asked and port is not None and not 0 <= port - int(asked[1]) <= _PORT_TRIES:
        return "metrics of the dashboard"
    for part, name in _NAMES:
        if part in command:
            return name or command.strip().split("(")[0].removeprefix("ray::").strip()
    return ""
