"""Decides which Host headers the endpoint accepts.

Another site can make its own name resolve to this machine (DNS rebinding); a browser then sends the
site's requests here, with that name as the Host. A Host that is an IP address is safe from this.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

WILDCARDS = ("0.0.0.0", "::")


class Hosts:
    """The names that clients may call the endpoint by, on any port, since tunnels change the port.

    host: the address it listens on. allowed: more names; `*.example.com` is any subdomain, `*` any
    name. If None, an endpoint that listens on all addresses accepts any name.
    """

    def __init__(self, host: str, allowed: str | Sequence[str] | None) -> None:
        names = [allowed] if isinstance(allowed, str) else list(allowed or ())
        if allowed is None and host.strip("[]") in WILDCARDS:
            names = ["*"]
        machine = socket.gethostname()
        own = ["localhost", "*.localhost", host, machine, f"{machine}.local"]
        names = [_as_sent(name.lower().rstrip(".")) for name in [*own, *names]]
        self._any = "*" in names
        self._names = frozenset(name for name in names if not name.startswith("*."))
        self._below = tuple(name[1:] for name in names if name.startswith("*."))

    def include(self, header: str) -> bool:
        """Whether a Host header is accepted, as an empty one is: such a client is not a browser."""
        name = _without_port(header.strip().lower())
        if self._any or not name or _is_address(name):
            return True
        return name in self._names or name.endswith(self._below)


def _as_sent(name: str) -> str:
    """A name as clients send it, with non-ASCII letters encoded by IDNA."""
    try:
        return name.encode("idna").decode()
    except UnicodeError:
        return name


def _without_port(header: str) -> str:
    name, _, port = header.rpartition(":")
    has_port = bool(name) and (port.isdecimal() or not port) and not header.endswith("]")
    is_bare_ipv6 = header.count(":") > 1 and not header.startswith("[")
    return (name if has_port and not is_bare_ipv6 else header).rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
