"""The facts about a cluster that the doctor gathers before judging it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptray.jobs.cluster.cluster_nodes import NoAnswer, Node

DASHBOARD = "dashboard"  # the process's common name


@dataclass(frozen=True)
class Disk:
    """A file system. what: its contents, in words. free, total: bytes."""

    what: str
    path: str
    free: int
    total: int


@dataclass(frozen=True)
class OpenPort:
    """A TCP port that other machines may reach, and the Ray process that listens on it."""

    process: str
    address: str
    port: int


@dataclass(frozen=True)
class NodeFacts:
    """What a node reports about itself.

    versions: of python, ray, torch and gptray; None: not installed. missing: required packages that
    are not installed. torch_cuda: the CUDA version of the PyTorch build; None: a CPU build. gpus:
    names. driver: NVIDIA's version. no_code: why nothing can be compiled for its GPUs or, without
    GPUs, why it has no C++ kernels. needs_token: whether Ray requires a token there.
    """

    hostname: str
    versions: Mapping[str, str | None]
    missing: tuple[str, ...] = ()
    torch_cuda: str | None = None
    gpus: tuple[str, ...] = ()
    driver: str | None = None
    no_code: str | None = None
    disks: tuple[Disk, ...] = ()
    shared_memory: Disk | None = None
    open_ports: tuple[OpenPort, ...] = ()
    needs_token: bool = True


@dataclass(frozen=True)
class Examined:
    """A node with its facts. clock_s: how far its clock is ahead of the driver's, at least."""

    node: Node
    facts: NodeFacts
    clock_s: float = 0.0


@dataclass(frozen=True)
class ClusterFacts:
    """All that the doctor has found out.

    silent: nodes that did not answer. blind: which nodes cannot use storage_path, in words. nccl:
    why an all-reduce over two GPUs failed; "": it worked; None: there are not two GPUs.
    """

    storage_path: str
    nodes: tuple[Examined, ...]
    silent: tuple[tuple[Node, NoAnswer], ...] = ()
    blind: tuple[str, ...] = ()
    nccl: str | None = None
