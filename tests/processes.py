"""What a process has started and where it listens, from /proc."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path


def marked(mark: str) -> dict[int, str]:
    """Command lines of the processes with this text in their environment, by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            if mark.encode() in (entry / "environ").read_bytes():
                found[pid] = (entry / "cmdline").read_text().replace("\0", " ").strip()
    return {pid: name for pid, name in found.items() if name}


def ray_workers(kind: str) -> set[int]:
    """The actors of a class on nodes that this process has started, by process id."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            is_one = (process / "cmdline").read_bytes().startswith(f"ray::{kind}".encode())
            # The raylet has started it, and this process the raylet.
            if is_one and _parent(_parent(process.name)) == str(os.getpid()):
                found.add(int(process.name))
    return found


def _parent(pid: str) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


def before_long(happened: Callable[[], object]) -> None:
    """Wait until something has happened; a minute at most."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def listening(pids: Iterable[int]) -> list[tuple[str, int]]:
    """Address and port of every TCP socket on which these processes listen."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets.update(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and rest[5] in sockets:
                address, _, port = local.partition(":")
                found.append((_address(address), int(port, 16)))
    return found


def _address(text: str) -> str:
    """The kernel's hexadecimal words, each in the machine's byte order."""
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
