"""Clusters of several nodes on this machine, and jobs that run on them in processes of their own.

A node is a raylet with its workers. The test's own process is not connected to the cluster: it may
hold the session's Ray.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
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
LIMIT_S = 240
# What the driver of a job works out, in a process of its own.
_ASK = """
import json, sys
import ray
from gptray.config import ComputeConfig, UserError
from gptray.jobs.cluster.resources import trial_resources, worker_resources

ray.init(log_to_driver=False, logging_level="ERROR")
answers = []
for keys in json.loads(sys.argv[1]):
    compute = ComputeConfig(**{**keys, "num_workers": keys.get("num_workers", 1)})
    try:
        trials = trial_resources(compute, trials=16, at_once=None)
        answers.append([worker_resources(compute), trials])
    except UserError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


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

    def drain(self, node: Any, seconds: float) -> None:
        """Announce that a node will be preempted, as a cloud does; without work it then ends."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        deadline_ms = int(1000 * (time.time() + seconds))
        preemption = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = GcsClient(address=self.address).drain_node(
            node.node_id, preemption, "", deadline_ms
        )
        assert accepted, why

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


def asked(*computes: dict[str, Any]) -> list[Any]:
    """What each worker and trial gets with these `compute` settings, or why there is no room."""
    command = [sys.executable, "-c", _ASK, json.dumps(computes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def line_with(text: str, process: subprocess.Popen[str]) -> str:
    """The job's next line on stderr that has the text."""
    clock = threading.Timer(LIMIT_S, process.kill)
    clock.start()
    try:
        assert process.stderr
        told = []
        for line in process.stderr:
            told.append(line)
            if text in line:
                return line
        raise AssertionError("".join(told))
    finally:
        clock.cancel()


def free_port() -> int:
    """A port of loopback that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
