"""Clusters whose autoscaler brings nodes on this machine, as a cloud's would."""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.nodes import LIMIT_S, cluster_of, free_port
from tests.processes import marked

_MARK = "GPTRAY_TEST_CLUSTER"
_HEAD = "ray.head.default"  # what the provider calls it
_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
# What the autoscaler expects in a complete file.
_EMPTY_LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)
_EMPTY_MAPS = ("auth", "docker", "file_mounts")
_STORE_BYTES = 100 << 20


def cluster_yaml(
    head: Mapping[str, float], types: Mapping[str, tuple[Mapping[str, float], int]], **provider: Any
) -> dict[str, Any]:
    """The config of a cluster. types: what nodes of each type have, and the most of them."""
    return {
        "cluster_name": "tests",
        "max_workers": 8,
        "idle_timeout_minutes": 5,
        "provider": {"type": "external", "module": _PROVIDER, **provider},
        **dict.fromkeys(_EMPTY_LISTS, []),
        **dict.fromkeys(_EMPTY_MAPS, {}),
        "head_node_type": _HEAD,
        "available_node_types": {
            _HEAD: {"resources": dict(head), "node_config": {}, "max_workers": 0},
            **{
                name: {"resources": dict(resources), "node_config": {}, "max_workers": most}
                for name, (resources, most) in types.items()
            },
        },
    }


@contextmanager
def autoscaling(
    folder: Path, head_cpus: int, types: Mapping[str, tuple[Mapping[str, float], int]], version: int
) -> Iterator[None]:
    """Have a cluster that grows by these types of nodes, and RAY_ADDRESS name it.

    version: of Ray's autoscaler, 1 or 2. Its nodes are this machine's, processes of the autoscaler.
    """
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
    from ray.util import get_node_ip_address

    port, mark = free_port(), secrets.token_hex(8)
    types = {
        name: ({**resources, "object_store_memory": _STORE_BYTES}, most)
        for name, (resources, most) in types.items()
    }
    config = folder / "cluster.yaml"
    provider = {
        "gcs_address": f"{get_node_ip_address()}:{port}",
        "head_node_id": FAKE_HEAD_NODE_ID,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "foreground_node_launch": True,
        "worker_liveness_check": False,
        "launch_multiple": version == 2,
    }
    config.write_text(json.dumps(cluster_yaml({"CPU": head_cpus}, types, **provider)))
    environment = {
        _MARK: mark,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": str(version - 1),
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_agent_register_timeout_ms": "120000",  # of nodes that start at the same time
    }
    if version == 2:  # as `ray up` sets them
        environment |= {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_NODE_TYPE_NAME": _HEAD}
    head = {"num_cpus": head_cpus, "gcs_server_port": port, "autoscaling_config": str(config)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            with cluster_of(head):
                for name in environment:  # jobs are no part of the cluster
                    patch.delenv(name)
                yield
    finally:
        _end(mark)


def _end(mark: str) -> None:
    """End the nodes that the autoscaler brought, which outlive it."""
    deadline = time.monotonic() + LIMIT_S
    while left := marked(mark):
        assert time.monotonic() < deadline, left
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
