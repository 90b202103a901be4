"""A lease on a folder in an object store: the right to write, for one process at a time.

A process puts its own lease into the folder and then lists the others: it may write only if there
are none. Two that come at once see each other, withdraw, and try again. So a store only needs
consistent listings, as in S3, GCS and Azure. The holder renews its lease. A waiting process that
sees no renewal for `EXPIRES_S` (no clocks are compared) removes the lease as left by a killed
process; on the same machine it sees at once that the process has ended. A holder that could not
renew its lease for that long has lost it, see `Lease.check`; nothing prevents its writes before it
checks.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from gptray.config import RunFailed, UserError
from gptray.storage.files import CannotWrite
from gptray.storage.remote_folder import RemoteFolder, StoredFile
from gptray.system import on_mac, sysctl

log = logging.getLogger("gptray")

EXPIRES_S, POLL_S = 30.0, 1.0
# For processes that come at once.
_TRIES, _MAX_PAUSE_S = 8, 2.0
# The clock that counts while a laptop sleeps: macOS's own monotonic clock does.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
PREFIX = "lease-"


class Lease:
    """This process's lease on a folder. busy: the message if another process holds it."""

    def __init__(self, place: RemoteFolder, busy: str, expires_s: float) -> None:
        self._busy, self._expires_s = busy, expires_s
        self._place, self._name = place, f"{PREFIX}{uuid.uuid4().hex[:12]}.json"
        self._renewed = 0.0
        self._ended = threading.Event()
        owner = {"host": socket.gethostname(), "machine": _machine(), **_process(os.getpid())}
        self._content = json.dumps(owner, indent=1).encode()

    def check(self) -> None:
        """Raise RunFailed unless this process still holds the lease."""
        if self._is_late():
            raise RunFailed(
                f"the lease on {self._place} could not be renewed for {self._expires_s:.0f} s, so "
                "another job may write there; the same command resumes"
            )

    def take(self) -> None:
        """Write the lease once no other process holds one. Raises UserError."""
        for _ in range(_TRIES):
            if others := _leases(self._place):
                self._wait_for_expiry(others)
            self._renew()
            if not _leases(self._place).keys() - {self._name}:
                return
            self._place.remove(self._name)
            time.sleep(random.uniform(0, _MAX_PAUSE_S))
        raise UserError(self._busy)

    def keep(self) -> None:
        """Renew the lease until `release` or until it is lost; runs in a thread."""
        while not self._ended.wait(self._expires_s / 4):
            try:
                if self._is_late() and self._name not in _leases(self._place):
                    return  # another process has removed it
                self._renew()
            except CannotWrite as error:
                log.warning("%s", error)

    def release(self) -> None:
        """End the lease."""
        self._ended.set()
        with suppress(CannotWrite):  # it will expire
            self._place.remove(self._name)

    def _wait_for_expiry(self, others: dict[str, StoredFile]) -> None:
        """Wait until all of these leases have expired, and remove them.

        Raises UserError as soon as one is renewed or a new one appears.
        """
        place, seconds = self._place, self._expires_s
        owners = {name: _owner(place, name) for name in others}
        alive = {name: owner for name, owner in owners.items() if not _is_dead(owner)}
        told = ", ".join(f"process {o.get('pid')} on {o.get('host')}" for o in alive.values())
        if alive:
            words = "%s: waiting up to %.0f s to see whether %s is still running"
            log.info(words, place, seconds, told)
        began = time.monotonic()
        while alive and time.monotonic() - began < seconds:
            time.sleep(POLL_S)
            now = _leases(place)
            if now.keys() - others.keys() or any(now[n] != others[n] for n in alive if n in now):
                raise UserError(f"{self._busy} ({told})")
            alive = {name: owner for name, owner in alive.items() if name in now}
        for name in others:
            place.remove(name)

    def _is_late(self) -> bool:
        return time.clock_gettime(_CLOCK) - self._renewed > self._expires_s

    def _renew(self) -> None:
        began = time.clock_gettime(_CLOCK)
        self._place.write(self._name, self._content)
        self._renewed = began


@contextmanager
def leased(place: RemoteFolder, *, busy: str, expires_s: float | None = None) -> Iterator[Lease]:
    """Hold the lease of a folder in the block. expires_s: by default EXPIRES_S.

    Raises UserError if another process holds it (the message `busy`), or if the folder cannot be
    written.
    """
    lease = Lease(place, busy, expires_s or EXPIRES_S)
    try:
        lease.take()
    except CannotWrite as error:
        raise UserError(str(error)) from None
    keeper = threading.Thread(target=lease.keep, name="lease", daemon=True)
    keeper.start()
    try:
        yield lease
    finally:
        lease.release()


def is_leased(files: Mapping[str, StoredFile]) -> bool:
    """Whether a job holds a lease among these files, as far as clocks agree."""
    leases = [
        one.modified / 1e9 for name, one in files.items() if Path(name).name.startswith(PREFIX)
    ]
    return time.time() - max(leases, default=0.0) < 2 * EXPIRES_S


def _leases(place: RemoteFolder) -> dict[str, StoredFile]:
    return {name: one for name, one in place.files().items() if name.startswith(PREFIX)}


def _owner(place: RemoteFolder, name: str) -> dict[str, object]:
    """A lease's description of its process; empty if it is gone or invalid."""
    try:
        owner = json.loads(place.read(name) or b"{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dead(owner: dict[str, object]) -> bool:
    """Whether a lease belongs to a process of this machine that has ended."""
    pid = owner.get("pid")
    if owner.get("machine") != _machine() or not isinstance(pid, int):
        return False
    try:
        return _process(pid)["began"] != owner.get("began")
    except (OSError, psutil.NoSuchProcess):
        return True


def _machine() -> str:
    """Identifies this machine's boot, and on Linux the namespace of its process ids."""
    if on_mac():
        return sysctl("kern.bootsessionuuid")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _process(pid: int) -> dict[str, object]:
    """A process's id and start time, which tells it from a later process with the same id."""
    if on_mac():
        return {"pid": pid, "began": psutil.Process(pid).create_time()}
    status = Path(f"/proc/{pid}/stat").read_text("utf-8")
    return {"pid": pid, "began": status.rpartition(")")[2].split()[19]}
