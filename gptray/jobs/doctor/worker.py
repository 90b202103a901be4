"""Gathers a node's versions, GPUs, disks and open ports, and tests NCCL between two GPUs.

Imports torch and Ray only for the NCCL test.
"""

from __future__ import annotations

import ipaddress
import os
import platform
import re
import shutil
import socket
import time
from contextlib import suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import psutil
import ray

from gptray.gpus import NVIDIA, nvidia_smi, torch_cuda
from gptray.jobs.cluster.own_ray import folder_of_ray
from gptray.jobs.doctor.facts import DASHBOARD, Disk, NodeFacts, OpenPort
from gptray.native.backend import why_not_native
from gptray.native.compiler import why_not_compile
from gptray.storage.files import cache_folder, is_uri
from gptray.wording import first_line

NAMED = ("ray", "torch", "gptray")
_SHARED_MEMORY = Path("/dev/shm")
# A part of a Ray process's command line, and the process's common name.
_NAMES = (
    ("dashboard/dashboard.py", DASHBOARD),
    ("gcs_server", "gcs_server"),
    ("ray::", ""),  # named by its title
    ("dashboard/agent.py", "dashboard agent"),
    ("runtime_env/agent", "runtime environment agent"),
    ("raylet/raylet", "raylet"),
    ("ray.util.client.server", "client server"),
)
# If its port is taken, the dashboard tries the next ones.
_PORT_TRIES = 50
# Deadlines for getting two GPUs, which other jobs may hold, and for connecting them.
DEADLINE_S = 120.0
MEET_S = 60.0


def node_facts(storage_path: str) -> NodeFacts:
    """Gather the facts of this machine."""
    gpus, driver = _gpus()
    is_store = is_uri(storage_path)
    places = (
        ("gptray's cache", cache_folder()) if is_store else ("storage_path", Path(storage_path)),
        ("Ray's files", folder_of_ray()),
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
        no_code=why_not_compile(on_gpu=True)
        if gpus
        else why_not_native(use_gpu=False, look_at_cache=True),
        disks=tuple(_disk(what, path) for what, path in places),
        shared_memory=_disk("shared memory", _SHARED_MEMORY) if _SHARED_MEMORY.exists() else None,
        open_ports=open_ports(),
        # If authentication is on, Ray sets this for all processes that it starts.
        needs_token=os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
    )


def clock() -> float:
    """Seconds since the epoch on this machine's clock."""
    return time.time()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _required() -> list[str]:
    """The packages that gptray's metadata requires; empty if it is not installed."""
    try:
        lines = metadata.requires("gptray") or []
    except metadata.PackageNotFoundError:
        return []
    return [re.split(r"[\s\[<>=!~;]", line)[0] for line in lines if "extra ==" not in line]


def _disk(what: str, path: Path) -> Disk:
    """The file system of a path, which need not exist yet."""
    there = next(one for one in (path, *path.parents) if one.exists())
    usage = shutil.disk_usage(there)
    return Disk(what, str(path), usage.free, usage.total)


def _gpus() -> tuple[tuple[str, ...], str | None]:
    """Names of all NVIDIA GPUs in the machine, and the driver's version."""
    lines = nvidia_smi("--query-gpu=name,driver_version", "--format=csv,noheader")
    if rows := [line.rsplit(", ", 1) for line in lines if ", " in line]:
        return tuple(name for name, _ in rows), rows[0][1]
    return tuple("NVIDIA GPU" for _ in NVIDIA.glob("*")), None


def open_ports() -> tuple[OpenPort, ...]:
    """TCP ports beyond loopback on which Ray processes listen, as far as we may inspect them."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        with suppress(psutil.Error):  # the process has ended, or is another user's
            for one in process.net_connections("tcp") if process_name(command) else ():
                if one.status == psutil.CONN_LISTEN and not _is_loopback(one.laddr.ip):
                    found.add(OpenPort(process_name(command, one.laddr.port), *one.laddr))
    return tuple(sorted(found, key=lambda one: (one.process, one.port)))


def _is_loopback(words: str) -> bool:
    address = ipaddress.ip_address(words)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def process_name(command: str, port: int | None = None) -> str:
    """A Ray process's name, given one of its ports; "" for any other process."""
    asked = re.search(r"dashboard/dashboard\.py.* --port=(\d+)", command)
    if asked and port is not None and not 0 <= port - int(asked[1]) <= _PORT_TRIES:
        return "metrics of the dashboard"
    for part, name in _NAMES:
        if part in command:
            return name or command.strip().split("(")[0].removeprefix("ray::").strip()
    return ""


def two_gpus_add_up(*, backend: str = "nccl", on_gpus: bool = True) -> str:
    """All-reduce a number over two processes, on two nodes if possible; "" or what failed.

    on_gpus: whether each gets a GPU. Needs Ray.
    """
    member = ray.remote(Member).options(
        num_cpus=0, num_gpus=int(on_gpus), scheduling_strategy="SPREAD"
    )
    members = [member.remote(), member.remote()]
    try:
        meeting = ray.get(members[0].meeting_point.remote(), timeout=DEADLINE_S)
        sums = [one.add_up.remote(backend, meeting, rank) for rank, one in enumerate(members)]
        found = ray.get(sums, timeout=DEADLINE_S)
    except ray.exceptions.GetTimeoutError:
        return f"no answer within {DEADLINE_S:.0f} s; other jobs may hold the GPUs"
    except ray.exceptions.RayError as error:
        return first_line(error)
    finally:
        for one in members:
            ray.kill(one)
    return next((problem for problem in found if problem), "")


class Member:
    """An actor of the all-reduce test."""

    def meeting_point(self) -> str:
        """A free address on this node."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return f"tcp://{address}:{probe.getsockname()[1]}"

    def add_up(self, backend: str, meeting: str, rank: int) -> str:
        """All-reduce a 1 with the other process; "" or what failed."""
        import torch
        from torch import distributed

        try:
            distributed.init_process_group(
                backend, meeting, timedelta(seconds=MEET_S), world_size=2, rank=rank
            )
            number = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
            distributed.all_reduce(number)
            distributed.destroy_process_group()
        except Exception as error:  # whatever CUDA, NCCL or the network raise
            return first_line(error)
        return "" if number.item() == 2 else f"1 + 1 = {number.item()}"
