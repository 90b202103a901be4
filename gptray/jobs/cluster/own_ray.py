"""The job's own Ray: shielded from the job's signals, closed to the network, ended with the job.

Ray's processes die with the process that started them. They would also die, in the middle of the
job's cleanup, from signals that a terminal, `timeout` or a service manager sends to the job's
process group. So each gets its own session. Where the system does not end them with that process,
as on macOS, a process that waits for its end does.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import psutil
import ray

from gptray import signals
from gptray.config import RunFailed, UserError
from gptray.system import on_mac

log = logging.getLogger("gptray")

# If one of these dies, Ray waits for minutes and then ends its driver without a message.
VITAL = ("raylet", "gcs_server")
# How long to wait, after an error, to learn whether a Ray process died; how often to check.
NOTICE_S, POLL_S = 1.0, 0.5
# How long Ray's shutdown may leave SIGTERM unhandled, in seconds.
KEPT_S = 0.02
# Set to 0, confines a Ray to its machine.
CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# A program that kills process groups when its input ends: when the process that started it does.
_REAPER = """
import os, signal, sys
sys.stdin.read()
for group in map(int, sys.argv[1:]):
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""
# One token for the lifetime of this process, since Ray keeps the first that it reads.
_TOKEN = secrets.token_hex(32)

_is_starting = False
_is_running = False


def is_own_ray() -> bool:
    """Whether this process, the job's driver, runs its own Ray."""
    return _is_running


def folder_of_ray() -> Path:
    """The folder in which Ray keeps its files, which depends on the system."""
    return Path(ray._common.utils.get_default_system_temp_dir())


def _leave_session() -> None:
    if _is_starting:
        os.setsid()


# Ray starts its processes with Popen and a preexec_fn; Python runs these hooks before that.
os.register_at_fork(after_in_child=_leave_session)


@contextmanager
def own_ray(environment: Mapping[str, str], **options: object) -> Iterator[None]:
    """Run Ray on this machine during the block; options are ray.init's.

    environment: variables that Ray's processes get in addition to this process's. If one of these
    died, the exception that this caused becomes a RunFailed.
    """
    global _is_starting, _is_running
    with _environment(environment):
        _is_starting = True
        before = _children()
        try:
            with _lean(told=bool(options.get("log_to_driver"))), _loopback():
                ray.init(address="local", include_dashboard=False, **options)
        finally:
            _is_starting = False
        if (address := ray.util.get_node_ip_address()) not in ("127.0.0.1", "::1"):
            log.warning("Ray's ports are open to the network, at %s", address)
        started = {pid: name for pid, name in _children().items() if pid not in before}
        shares_fate = ray._private.utils.detect_fate_sharing_support()
        deaths = _Deaths(started)
        with (
            nullcontext() if shares_fate else _reaped(started),
            signals.before_ending_at_once(deaths.kill_all),
        ):
            _is_running = True
            try:
                yield
            except BaseException as error:
                is_known = isinstance(error, (KeyboardInterrupt, UserError))
                if deaths.died.wait(0 if is_known else NOTICE_S):
                    raise RunFailed(deaths.message) from None
                raise
            finally:
                _is_running = False
                deaths.close()
                if deaths.died.is_set():
                    deaths.kill_all()
                else:
                    shut_down()


@contextmanager
def _environment(given: Mapping[str, str]) -> Iterator[None]:
    """Set the environment that Ray and its processes read when they start.

    RAY_AUTH_TOKEN: otherwise Ray creates a world-readable token in ~/.ray, which a later `ray
    start` would demand from clients that do not know it. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER: makes
    Ray's processes bind their ports to the loopback address. GLOO_SOCKET_IFNAME: the same for
    torch.distributed.
    PYTHONWARNINGS and RAY_AUTH_MODE are unset: with warnings as errors Ray does not start, and the
    mode is meant for a cluster; Ray's default asks for the token.
    """
    wanted = {
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN", _TOKEN),
        CLUSTERS: "0",
        "GLOO_SOCKET_IFNAME": "lo0" if on_mac() else "lo",
        **given,
    }
    unset = ("PYTHONWARNINGS", "RAY_AUTH_MODE")
    before = {key: os.environ.get(key) for key in [*wanted, *unset]}
    for key in unset:
        os.environ.pop(key, None)
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def _lean(*, told: bool) -> Iterator[None]:
    """Make ray.init skip what only clusters with many jobs need, which saves two seconds.

    Skipped are the autoscaler, the dashboard's server (of which only usage statistics would be
    left), the process that forwards workers' logs unless they are shown, and a check for the
    packages of `ray[default]`. Ray's reaper, for systems such as macOS, would move this process to
    another process group, where a terminal's Ctrl-C does not reach it; see `_reaped`.
    """
    node = ray._private.node.Node
    left_out = [(node, "start_monitor"), (node, "start_api_server")]
    left_out += [(node, "start_reaper_process")]
    left_out += [(ray._private.utils, "get_dashboard_dependency_error")]
    left_out += [] if told else [(node, "start_log_monitor")]
    before = [getattr(*one) for one in left_out]
    for owner, name in left_out:
        setattr(owner, name, lambda *given, **named: None)
    try:
        yield
    finally:
        for (owner, name), function in zip(left_out, before, strict=True):
            setattr(owner, name, function)


@contextmanager
def _loopback() -> Iterator[None]:
    """Make ray.init heed CLUSTERS, which Ray reads only when it is imported."""
    constants = ray._private.ray_constants
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = os.environ[CLUSTERS] != "0"
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def shut_down() -> None:
    """Shut Ray down, restoring this process's SIGTERM handler, which Ray's core resets."""
    if threading.current_thread() is not threading.main_thread():
        ray.shutdown()
        return
    handler = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as thread:
        shutdown = thread.submit(ray.shutdown)
        while not shutdown.done():
            wait([shutdown], KEPT_S)
            signal.signal(signal.SIGTERM, handler)
        shutdown.result()


def _children() -> dict[int, str]:
    """This process's children, by pid, with their names."""
    found = {}
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            found[child.pid] = child.name()
    return found


@contextmanager
def _reaped(groups: Iterable[int]) -> Iterator[None]:
    """If this process dies in the block, kill these process groups."""
    command = [sys.executable, "-c", _REAPER, *map(str, groups)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as reaper:
        try:
            yield
        finally:
            reaper.kill()


class _Deaths:
    """Watches Ray's processes and fails the job when a vital one dies."""

    def __init__(self, processes: Mapping[int, str]) -> None:
        self.message = ""
        self.died = threading.Event()
        self._processes = processes
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="deaths", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching; from now on Ray's processes may end."""
        self._closed.set()
        self._thread.join()

    def kill_all(self) -> None:
        """Kill Ray's processes, since Ray's own shutdown would wait for a dead one.

        Also kills the processes that these started, which are in the same sessions and would
        outlive them by a minute.
        """
        # Parents first: a raylet would replace the processes that it loses.
        for pid in self._processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in psutil.pids():
            with suppress(ProcessLookupError, PermissionError):
                if os.getsid(pid) in self._processes:
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
    """Whether a child of this process has ended; does not reap it."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
