"""A Ray of the job's own: apart from the job's signals, closed to the network, gone with the job.

Ray's processes die with the process that started them, but they would also die of the signals that
a terminal, `timeout` or a service manager sends to a job's whole process group, and the job with
them in the middle of its way out. So they get sessions of their own.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gptray import signals
from gptray.config import RunFailed, UserError

log = logging.getLogger("gptray")

# The processes without which Ray waits for minutes, and then ends its driver without a word.
VITAL = ("raylet", "gcs_server")
# Seconds in which a process may turn out to have died after an error of Ray's, and between looks.
NOTICE_S, POLL_S = 1.0, 0.5
# One token for the life of this process: Ray keeps the first that it reads.
_TOKEN = secrets.token_hex(32)

_is_starting = False


def _leave_session() -> None:
    if _is_starting:
        os.setsid()


# Ray starts its processes by Popen with a preexec_fn, before which Python runs these.
os.register_at_fork(after_in_child=_leave_session)


@contextmanager
def own_ray(**options: Any) -> Iterator[None]:
    """Have a Ray on this machine meanwhile; options are ray.init's.

    Raises:
        RunFailed: one of its processes died; what the block raised because of that is dropped.
    """
    global _is_starting
    with _environment():
        import ray

        _is_starting = True
        before = _children()
        try:
            ray.init(address="local", include_dashboard=False, **options)
        finally:
            _is_starting = False
        _tell_open_ports(ray.util.get_node_ip_address())
        deaths = _Deaths({pid: name for pid, name in _children().items() if pid not in before})
        try:
            yield
        except BaseException as error:
            is_known = isinstance(error, (KeyboardInterrupt, UserError))
            if deaths.died.wait(0 if is_known else NOTICE_S):
                raise RunFailed(deaths.message) from None
            raise
        finally:
            deaths.close()
            if deaths.died.is_set():
                deaths.kill_others()
            else:
                ray.shutdown()


@contextmanager
def _environment() -> Iterator[None]:
    """What Ray and its processes read at their start.

    Ray would make a token in ~/.ray, readable by all, where a later `ray start` takes it up and
    asks clients for it that know of none. The second has Ray take the loopback address for the
    machine's own and bind its ports to that; the third does so for torch.distributed.
    """
    wanted = {
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN", _TOKEN),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    before = {key: os.environ.get(key) for key in [*wanted, "RAY_AUTH_MODE"]}
    os.environ.pop("RAY_AUTH_MODE", None)  # meant for a cluster; Ray's default asks for the token
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _tell_open_ports(address: str) -> None:
    """Say so where Ray, imported before by somebody else, listens on every network."""
    if address not in ("127.0.0.1", "::1"):
        log.warning("Ray's ports are open to the network, at %s", address)


def _children() -> dict[int, str]:
    """The processes that this one has started, and their names."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            for pid in (task / "children").read_text("utf-8").split():
                found[int(pid)] = Path(f"/proc/{pid}/comm").read_text("utf-8").strip()
    return found


class _Deaths:
    """Watches Ray's processes; when a vital one dies, the job is interrupted as a failure."""

    def __init__(self, processes: Mapping[int, str]) -> None:
        self.message = ""
        self.died = threading.Event()
        self._processes = processes
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="deaths", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no longer: from here on Ray's processes may end."""
        self._closed.set()
        self._thread.join()

    def kill_others(self) -> None:
        """End what is left; Ray's own way out would wait for the one that is dead."""
        for pid in self._processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _watch(self) -> None:
        vital = {pid: name for pid, name in self._processes.items() if name in VITAL}
        while not self._closed.wait(POLL_S):
            died = [name for pid, name in vital.items() if _has_ended(pid)]
            if died:
                self.message = (
                    f"Ray's process {died[0]} died, killed or out of memory; "
                    "the same command resumes"
                )
                self.died.set()
                signals.fail(self.message)
                return


def _has_ended(pid: int) -> bool:
    """Whether a child of this process has ended; who waits for it still can."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
