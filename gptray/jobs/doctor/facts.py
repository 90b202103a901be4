"""What is known of a cluster before it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptray.jobs.cluster_nodes import NoAnswer, Node

DASHBOARD = "dashboard"  # what people know that process of Ray's by


@dataclass(frozen=True)
class Disk:
    """A file system. what: is kept there, in words. free, total: bytes."""

    what: str
    path: str
    free: int
    total: int


@dataclass(frozen=True)
class OpenPort:
    """A TCP port that other machines may reach, and the process of Ray's that listens on it."""

    process: str
    address: str
    port: int


@dataclass(frozen=True)
class NodeFacts:
    """What a node says of itself.

    versions: of python, ray, torch and gptray; None: not installed. missing: what gptray requires
    and is not installed. torch_cuda: the CUDA that PyTorch is built for; None: it is for CPUs.
    gpus: names. driver: NVIDIA's. needs_token: whether Ray there asks for a token.
    """

    hostname: str
    versions: Mapping[str, str | None]
    missing: tuple[str, ...] = ()
    torch_cuda: str | None = None
    gpus: tuple[str, ...] = ()
    driver: str | None = None
    disks: tuple[Disk, ...] = ()
    shared_memory: Disk | None = None
    open_ports: tuple[OpenPort, ...] = ()
    needs_token: bool = True


@dataclass(frozen=True)
class Examined:
    """A node with its facts; clock_s: seconds that its clock is certainly ahead of the driver's."""

    node: Node
    facts: NodeFacts
    clock_s: float = 0.0


@dataclass(frozen=True)
class ClusterFacts:
    """All that the doctor has seen.

    silent: nodes that did not answer. blind: what nodes do not see of storage_path, in words.
    nccl: why two GPUs could not add a number up; "": they could; None: there are not two.
    """

    storage_path: str
    nodes: tuple[Examined, ...]
    silent: tuple[tuple[Node, NoAnswer], ...] = ()
    blind: tuple[str, ...] = ()
    nccl: str | None = None
