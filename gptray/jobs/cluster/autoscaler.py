"""The nodes that a cluster's autoscaler may add, as far as the cluster itself knows."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
import yaml

from gptray.jobs.cluster.cluster_nodes import NoAnswer, Resources, alive_nodes, amount_words, ask

log = logging.getLogger("gptray")

# Ray's prefix for the made-up types of nodes that no autoscaler added.
_BY_HAND = "node_"
# A label of nodes that autoscaler v2 or Kubernetes started, including the head.
_GROUP_LABEL = "ray.io/node-group"


class NodeType(NamedTuple):
    """Nodes that an autoscaler may add. resources: of each. most: how many; None: no limit."""

    resources: Resources
    most: int | None


def grows() -> bool:
    """Whether the cluster has an autoscaler that may add nodes. Needs Ray."""
    return node_types() != []


def node_types() -> list[NodeType] | None:
    """The nodes that the autoscaler may run at most, including those it has already added.

    Empty: there is no autoscaler, or it may add none. None: unknown, as on Kubernetes. Needs Ray.
    """
    published = ray._private.state.state.get_cluster_config()
    if published and published.node_group_configs:
        return [
            NodeType(dict(group.resources), None if group.max_count < 0 else group.max_count)
            for group in published.node_group_configs
        ]
    return _types_on_head(ray.get_runtime_context().gcs_address) if _is_there() else []


def _is_there() -> bool:
    status = ray._private.worker.global_worker.gcs_client.internal_kv_get(
        ray._private.ray_constants.DEBUG_AUTOSCALING_STATUS.encode(), None
    )
    report = (json.loads(status) if status else {}).get("autoscaler_report")
    if report:  # autoscaler v1
        return any(not name.startswith(_BY_HAND) for name in report["active_nodes"])
    return any(_GROUP_LABEL in node.labels for node in alive_nodes())


@functools.cache
def _types_on_head(gcs_address: str) -> list[NodeType] | None:
    """The autoscaler's node types, read on the head's machine."""
    heads = [node for node in alive_nodes() if node.is_head]
    for answer in ask(heads, configured_types, gcs_address, about="its autoscaler"):
        if not isinstance(answer, NoAnswer):
            return answer
        log.debug("autoscaler: the head %s", answer.reason)
    return None


def configured_types(gcs_address: str) -> list[NodeType] | None:
    """The node types in the config file of the cluster's autoscaler, if it runs on this machine."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        options = dict(word[2:].split("=", 1) for word in words if word[:2] == "--" and "=" in word)
        file = options.get("autoscaling-config")
        if file and options.get("gcs-address") == gcs_address:
            with suppress(FileNotFoundError, PermissionError):
                return types_in(yaml.safe_load(Path(file).expanduser().read_text("utf-8")))
    return None


def types_in(config: Mapping[str, Any]) -> list[NodeType] | None:
    """The worker types in a cluster's YAML; None if it does not state their resources.

    On clouds, `ray up` fills in the machines' resources in the file that it leaves on the head.
    """
    most_in_all = config["max_workers"]
    found = [
        NodeType(one.get("resources") or {}, min(one.get("max_workers", most_in_all), most_in_all))
        for name, one in config["available_node_types"].items()
        if name != config["head_node_type"]
    ]
    found = [one for one in found if one.most]
    return found if all("CPU" in one.resources for one in found) else None


def types_words(types: Iterable[NodeType]) -> str:
    """The types in words, such as "up to 3 nodes of 16 cores; nodes of 1 GPU and 4 cores"."""
    return "; ".join(
        f"up to {most} {'node' if most == 1 else 'nodes'} of {amount_words(resources)}"
        if most is not None
        else f"nodes of {amount_words(resources)}"
        for resources, most in types
    )
