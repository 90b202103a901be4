"""A Ray cluster of two nodes on this machine, the second with a file system of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

# The second node's address and, as its label `node`, its name.
SECOND, NAME = "127.0.0.2", "second"
START_S = 120
# Connects as soon as there is a head, and ends when there are enough nodes.
_UNTIL = """
import time, ray
while not ray.is_initialized():
    try:
        ray.init(log_to_driver=False, logging_level="ERROR")
    except Exception:
        time.sleep(0.2)
while sum(node["Alive"] for node in ray.nodes()) < {number}:
    time.sleep(0.1)
"""


def may_unshare() -> bool:
    """Whether this process may give another a file system of its own."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", tempfile.gettempdir()]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@contextmanager
def two_nodes(
    hidden: Sequence[Path], folder: Path, *, cores: int = 2, size: str = "64k"
) -> Iterator[dict[str, str]]:
    """A head of one core, and a node with `cores` that has empty folders in place of `hidden`.

    Gives the environment of a job on that cluster. folder: for what the nodes' Ray says. size: of
    each empty folder.
    """
    ray = str(Path(sys.executable).with_name("ray"))
    port = _free_port()
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    common = ["--block", "--disable-usage-stats"]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:
        head = [ray, "start", "--head", f"--port={port}", "--num-cpus=1", *common]
        head += [f"--temp-dir={temporary}", "--include-dashboard=False"]
        mounts = " && ".join(f'mount -t tmpfs -o size={size} none "{path}"' for path in hidden)
        second = ["unshare", "-m", "sh", "-c", f'{mounts} && exec "$@"', "sh", ray, "start"]
        second += [
            f"--address=127.0.0.1:{port}",
            f"--node-ip-address={SECOND}",
            f"--num-cpus={cores}",
        ]
        second += [f"--labels=node={NAME}"]
        second += common
        with ending() as processes:
            of_jobs = {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
            for number, command in enumerate((head, second), start=1):
                command += [f"--dashboard-agent-listen-port={_free_port()}"]
                with (folder / f"node{number}.log").open("w") as log:
                    processes.append(_started(command, environment, log.fileno()))
                _wait_for_nodes(number, of_jobs)
            yield of_jobs


def _started(command: list[str], environment: Mapping[str, str], out: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=environment, stdout=out, stderr=out, start_new_session=True, text=True
    )


@contextmanager
def ending() -> Iterator[list[subprocess.Popen[str]]]:
    """Have a list of leaders of sessions, whose processes end with the block, the last first."""
    processes: list[subprocess.Popen[str]] = []
    try:
        yield processes
    finally:
        for process in reversed(processes):
            for entry in Path("/proc").iterdir():
                with suppress(ProcessLookupError, ValueError):
                    if os.getsid(int(entry.name)) == process.pid:
                        os.kill(int(entry.name), signal.SIGKILL)
            process.wait()


def _wait_for_nodes(number: int, environment: Mapping[str, str]) -> None:
    """Return when so many nodes are in the cluster."""
    command = [sys.executable, "-c", _UNTIL.format(number=number)]
    subprocess.run(command, env=environment, capture_output=True, check=True, timeout=START_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
