"""What a node is asked: its versions, GPUs, disks and ports. Loads neither torch nor Ray."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path

from gptray.gpus import NVIDIA, torch_cuda
from gptray.jobs.doctor.facts import Disk, NodeFacts
from gptray.jobs.doctor.listening import open_ports

NAMED = ("ray", "torch", "gptray")
_SHARED_MEMORY = Path("/dev/shm")


def node_facts(storage_path: str) -> NodeFacts:
    """Look at the machine of this process."""
    gpus, driver = _gpus()
    places = (
        ("storage_path", Path(storage_path)),
        ("Ray's files", Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())),
    )
    return NodeFacts(
        hostname=socket.gethostname(),
        versions={
            "python": platform.python_version(),
            **{name: _version(name) for name in NAMED},
        },
        missing=tuple(sorted(name for name in _required() if _version(name) is None)),
        torch_cuda=torch_cuda(),
        gpus=gpus,
        driver=driver,
        disks=tuple(_disk(what, path) for what, path in places),
        shared_memory=_disk("shared memory", _SHARED_MEMORY) if _SHARED_MEMORY.exists() else None,
        open_ports=open_ports(),
        # Where it is on, Ray sets this for all that it starts.
        needs_token=os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
    )


def clock() -> float:
    """Seconds since 1970 on the clock of this process's machine."""
    return time.time()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _required() -> list[str]:
    """The packages that gptray cannot do without, where it says so itself."""
    try:
        lines = metadata.requires("gptray") or []
    except metadata.PackageNotFoundError:
        return []
    return [re.split(r"[\s\[<>=!~;]", line)[0] for line in lines if "extra ==" not in line]


def _disk(what: str, path: Path) -> Disk:
    """The file system of a path, which need not be there yet."""
    there = next(one for one in (path, *path.parents) if one.exists())
    usage = shutil.disk_usage(there)
    return Disk(what, str(path), usage.free, usage.total)


def _gpus() -> tuple[tuple[str, ...], str | None]:
    """Names of the machine's NVIDIA GPUs, whoever may use them, and their driver's version."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        rows = [line.rsplit(", ", 1) for line in told.stdout.splitlines() if ", " in line]
    except (OSError, subprocess.TimeoutExpired):
        rows = []
    if rows:
        return tuple(name for name, _ in rows), rows[0][1]
    return tuple("NVIDIA GPU" for _ in NVIDIA.glob("*")), None
