"""Judges the facts about a cluster: for each check, whether all is well or what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gptray.jobs.doctor.facts import DASHBOARD, ClusterFacts, Disk, Examined
from gptray.storage.files import is_uri
from gptray.wording import count, time_words

# With less free space than this, Ray's processes and checkpoints soon fail. Above this used share
# of a disk, Ray stores no more objects there.
LEAST_FREE = 1 << 30
FULL = 0.95
# Docker's default for containers.
SMALL_SHARED_MEMORY = 64 << 20
CLOCK_S = 2.0
# The oldest Linux driver for each CUDA version, according to NVIDIA's CUDA release notes.
OLDEST_DRIVER = {12: 525, 13: 580}


# warn: jobs run, but something should change.
Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    level: Level
    message: str

    @property
    def words(self) -> str:
        """What was checked and found."""
        return f"{self.check}: {self.message}"

    @property
    def line(self) -> str:
        """The same as a line of the log."""
        return f"{self.level:4}  {self.words}"


def judge(facts: ClusterFacts) -> list[Finding]:
    """One finding for each check, in a fixed order."""
    checks = {
        "nodes": nodes,
        "versions": versions,
        "packages": packages,
        "gpus": gpus,
        "compiler": compiler,
        "nccl": nccl,
        "storage": storage,
        "disk": disks,
        "shared memory": shared_memory,
        "authentication": authentication,
        "ports": ports,
        "clocks": clocks,
    }
    return [Finding(name, *check(facts)) for name, check in checks.items()]


def nodes(facts: ClusterFacts) -> tuple[Level, str]:
    """Whether every node answers."""
    silent = [f"{node.address} {answer.reason}" for node, answer in facts.silent]
    if silent:
        remedy = "install the same gptray on every node, or remove the node from the cluster"
        return "fail", f"{'; '.join(silent)}; {remedy}"
    offers = []
    for one in facts.nodes:
        gpus = f", {count(round(one.node.gpus), 'GPU')}" if one.node.gpus else ""
        offers.append(f"{one.node.address} ({count(round(one.node.cpus), 'core')}{gpus})")
    return "ok", ", ".join(offers)


def versions(facts: ClusterFacts) -> tuple[Level, str]:
    """Whether all nodes run the same versions."""
    names = [name for one in facts.nodes[:1] for name in one.facts.versions]
    differing = []
    for name in names:
        found = {one.node.address: one.facts.versions.get(name) for one in facts.nodes}
        if len(set(found.values())) > 1:
            told = ", ".join(f"{version or 'none'} on {node}" for node, version in found.items())
            differing.append(f"{name} {told}")
    if differing:
        remedy = "install the same versions on every node"
        return "fail", f"{'; '.join(differing)}; {remedy}"
    same = [
        f"{name} {version or 'not installed as a package'}"
        for one in facts.nodes[:1]
        for name, version in one.facts.versions.items()
    ]
    return "ok", f"{', '.join(same)} on {count(len(facts.nodes), 'node')}"


def packages(facts: ClusterFacts) -> tuple[Level, str]:
    """Whether every node has what gptray requires."""
    missing = [
        f"{one.node.address} lacks {', '.join(one.facts.missing)}"
        for one in facts.nodes
        if one.facts.missing
    ]
    if missing:
        remedy = "install gptray there with pip, which installs them"
        return "fail", f"{'; '.join(missing)}; {remedy}"
    return "ok", "every node has what gptray requires"


def gpus(facts: ClusterFacts) -> tuple[Level, str]:
    """Whether GPUs, driver, CUDA build and the GPUs offered to Ray fit together."""
    problems = [problem for one in facts.nodes for problem in _gpu_problems(one)]
    if problems:
        level: Level = "fail" if any(bad for bad, _ in problems) else "warn"
        return level, "; ".join(words for _, words in problems)
    there = [
        f"{one.node.address}: {len(one.facts.gpus)} x {one.facts.gpus[0]}, driver "
        f"{one.facts.driver or 'unknown'}, PyTorch for CUDA {one.facts.torch_cuda}"
        for one in facts.nodes
        if one.facts.gpus
    ]
    return "ok", "; ".join(there) or "none"


def _gpu_problems(one: Examined) -> list[tuple[bool, str]]:
    """A node's problems: whether each is a failure, and what is wrong."""
    facts, address = one.facts, one.node.address
    offered, found = round(one.node.gpus), len(facts.gpus)
    problems = []
    if offered != found:
        remedy = f"start Ray there with --num-gpus={found}"
        told = f"{address} has {count(found, 'GPU')} and offers {offered} to Ray; {remedy}"
        problems.append((False, told))
    if not found:
        return problems
    if facts.torch_cuda is None:
        remedy = "pip install --force-reinstall torch"
        problems.append((True, f"PyTorch on {address} is a CPU build; {remedy}"))
    elif facts.driver:
        least = OLDEST_DRIVER.get(int(facts.torch_cuda.split(".")[0]), 0)
        if int(facts.driver.split(".")[0]) < least:
            told = (
                f"driver {facts.driver} on {address} is too old for PyTorch's CUDA "
                f"{facts.torch_cuda}; install driver {least} or newer, or a PyTorch for an older "
                "CUDA"
            )
            problems.append((True, told))
    return problems


def compiler(facts: ClusterFacts) -> tuple[Level, str]:
    """Whether the nodes that work can compile their GPUs' code or have the C++ kernels for CPUs."""
    lacking = [one for one in facts.nodes if one.facts.no_code and (one.node.cpus or one.node.gpus)]
    if not lacking:
        return "ok", "every node can compile what it needs"
    with_gpus = [one for one in lacking if one.facts.gpus]
    told = with_gpus or lacking
    reasons = "; ".join(f"{one.node.address}: {one.facts.no_code}" for one in told)
    if with_gpus:
        return "fail", f"torch.compile does not work on the GPUs of {reasons}"
    return "warn", f"no C++ kernels on {reasons}; jobs use PyTorch there, which is slower"


def nccl(facts: ClusterFacts) -> tuple[Level, str]:
    """Whether two GPUs reach each other."""
    if facts.nccl is None:
        return "ok", "not tested: it takes two GPUs"
    if facts.nccl:
        remedy = "set NCCL_DEBUG=INFO for details, or NCCL_SOCKET_IFNAME to choose the network"
        return "fail", f"two GPUs cannot communicate: {facts.nccl}; {remedy}"
    return "ok", "two GPUs can communicate"


def storage(facts: ClusterFacts) -> tuple[Level, str]:
    """Whether all nodes share storage_path."""
    if facts.blind:
        return "fail", "; ".join(facts.blind)
    on = "every node" if len(facts.nodes) > 1 else "the only node"
    if is_uri(facts.storage_path):
        return "ok", f"storage_path={facts.storage_path} answers {on}"
    return "ok", f"storage_path={facts.storage_path} is readable and writable on {on}"


def disks(facts: ClusterFacts) -> tuple[Level, str]:
    """Whether there is space for Ray's files and for runs."""
    full, filling = [], []
    for one in facts.nodes:
        for disk in one.facts.disks:
            words = f"{_size(disk.free)} free for {disk.what} in {disk.path} on {one.node.address}"
            if disk.free < LEAST_FREE:
                full.append(words)
            elif disk.free < (1 - FULL) * disk.total:
                filling.append(f"{words}, {1 - disk.free / disk.total:.0%} used")
    if full:
        return "fail", f"{'; '.join([*full, *filling])}; make room"
    if filling:
        remedy = f"Ray stores no objects on a disk that is more than {FULL:.0%} full"
        return "warn", f"{'; '.join(filling)}; {remedy}"
    every = [disk for one in facts.nodes for disk in one.facts.disks]
    return "ok", f"at least {_size(_least_free(every))} free everywhere"


def shared_memory(facts: ClusterFacts) -> tuple[Level, str]:
    """Whether /dev/shm has room for Ray's objects and for NCCL."""
    levels = []
    for one in facts.nodes:
        shm, wanted = one.facts.shared_memory, int(one.node.resources.get("object_store_memory", 0))
        if shm and shm.total <= SMALL_SHARED_MEMORY:
            levels.append(("fail", f"{_size(shm.total)} in {shm.path} on {one.node.address}"))
        elif shm and shm.total < wanted:
            words = f"{_size(shm.total)} in {shm.path} on {one.node.address}, where Ray wants "
            levels.append(("warn", f"{words}{_size(wanted)}"))
    if levels:
        level: Level = "fail" if "fail" in dict(levels) else "warn"
        remedy = "give containers more (docker run --shm-size, or an emptyDir in memory)"
        return level, f"{'; '.join(w for _, w in levels)}; {remedy}"
    every = [one.facts.shared_memory for one in facts.nodes if one.facts.shared_memory]
    if not every:
        return "ok", "no /dev/shm, as on macOS: Ray keeps its objects in its folder"
    return "ok", f"at least {_size(_least_free(every))} free in /dev/shm"


def authentication(facts: ClusterFacts) -> tuple[Level, str]:
    """Whether Ray asks for a token."""
    open_nodes = [one.node.address for one in facts.nodes if not one.facts.needs_token]
    if open_nodes:
        remedy = "set RAY_AUTH_MODE=token and create a token with ray get-auth-token --generate"
        reach = "anyone who can reach Ray's ports can run code"
        told = f"Ray does not require a token on {', '.join(open_nodes)}: {reach}; {remedy}"
        return "warn", told
    return "ok", "Ray requires a token"


def ports(facts: ClusterFacts) -> tuple[Level, str]:
    """Which ports others can reach, above all the dashboard's, which lets anyone run code."""
    reachable = [one for one in facts.nodes if one.facts.open_ports]
    dashboards = [
        (one, port)
        for one in reachable
        for port in one.facts.open_ports
        if port.process == DASHBOARD
    ]
    if any(not one.facts.needs_token for one, _ in dashboards):
        at = ", ".join(dict.fromkeys(f"{port.address}:{port.port}" for _, port in dashboards))
        reach = "anyone who can reach it can run code"
        told = f"the dashboard listens on {at} and does not require a token: {reach}"
        remedy = "start Ray with --dashboard-host=127.0.0.1, or with RAY_AUTH_MODE=token"
        return "fail", f"{told}; {remedy}"
    if not reachable:
        return "ok", "Ray listens only on this machine's loopback address"
    by_node = []
    for one in reachable:
        listening = ", ".join(f"{port.process} {port.port}" for port in one.facts.open_ports)
        by_node.append(f"{one.node.address} {listening}")
    told = f"open beyond loopback: {'; '.join(by_node)}"
    if not all(one.facts.needs_token for one in reachable):
        remedy = "without a token, keep them behind a firewall"
        return "warn", f"{told}; {remedy}"
    return "ok", f"{told}; all except the metrics ports require the token"


def clocks(facts: ClusterFacts) -> tuple[Level, str]:
    """Whether the nodes' clocks agree with the driver's."""
    apart = [
        f"{one.node.address} is {time_words(abs(one.clock_s))} "
        f"{'ahead of' if one.clock_s > 0 else 'behind'} this machine"
        for one in facts.nodes
        if abs(one.clock_s) > CLOCK_S
    ]
    if apart:
        remedy = "synchronize every node's clock (chrony, systemd-timesyncd)"
        return "fail", f"{'; '.join(apart)}; {remedy}"
    return "ok", f"within {CLOCK_S:g} s of this machine's"


def _least_free(found: Iterable[Disk]) -> int:
    return min((disk.free for disk in found), default=0)


def _size(bytes_: int) -> str:
    return f"{bytes_ / 2**30:,.1f} GiB" if bytes_ >= 2**30 else f"{bytes_ / 2**20:,.1f} MiB"
