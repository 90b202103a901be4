"""Clusters of several nodes on this machine, and jobs that run on them in processes of their own.

A node is a raylet with its workers. The test's own process is not connected to the cluster: it may
hold the session's Ray.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A node without an answer for so long is lost; Ray's own figures make that half a minute.
_HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3,
}
_STORE_BYTES = 100 << 20


class Nodes:
    """A running cluster; its first node is the head, where drivers connect."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.address: str | None = None

    def add(self, num_cpus: int, **options: Any) -> Any:
        """Start a node and return it. options: `num_gpus`, `resources`, `labels` ... as Ray's."""
        node = self._cluster.add_node(
            num_cpus=num_cpus,
            object_store_memory=_STORE_BYTES,
            include_dashboard=False,
            dashboard_agent_listen_port=0,
            **({} if self.address else {"_system_config": _HEALTH}),
            **options,
        )
        self.address = self._cluster.address
        return node

    def kill(self, node: Any) -> None:
        """Lose a node at once: SIGKILL to its raylet and to what that started."""
        self._cluster.remove_node(node, allow_graceful=False)


@contextmanager
def cluster_of(*nodes: dict[str, Any]) -> Iterator[tuple[Nodes, list[Any]]]:
    """Have a cluster of these nodes (`num_cpus` and other options), and RAY_ADDRESS name it.

    Gives the cluster and its nodes, the head first.
    """
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        handler = signal.getsignal(signal.SIGTERM)  # a node puts its own in its place
        cluster = Cluster()
        try:
            running = Nodes(cluster)
            started = [running.add(**node) for node in nodes]
            assert running.address
            patch.setenv("RAY_ADDRESS", running.address)
            yield running, started
        finally:
            cluster.shutdown()
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def job(name: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Run jobs/NAME.py with the environment of this process, RAY_ADDRESS included; end it."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
