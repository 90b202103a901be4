"""How many cores a worker reserves on clusters of different nodes."""

from __future__ import annotations

from typing import Any

import pytest

from gptray.config import ComputeConfig
from gptray.jobs.cluster.autoscaler import NodeType
from gptray.jobs.cluster.cluster_nodes import Node, has_labels, labels_words
from gptray.jobs.cluster.resources import cores_that_fit, misfit

HEAD = {"CPU": 16.0}
SMALL = {"CPU": 4.0, "GPU": 1.0}
LARGE = {"CPU": 64.0, "GPU": 8.0}
GPU: dict[str, Any] = {"use_gpu": True}


@pytest.mark.parametrize(
    ("keys", "nodes", "workers", "expected"),
    [
        ({}, [HEAD], 1, 16),
        ({}, [HEAD, SMALL], 1, 16),
        ({}, [HEAD, SMALL], 5, 4),
        ({}, [{"CPU": 2.0}], 3, 0),
        (GPU, [HEAD, SMALL], 1, 4),  # no node has 16 cores and a GPU
        (GPU, [HEAD, SMALL], 2, 0),
        (GPU, [HEAD], 1, 0),
        (GPU, [LARGE], 1, 8),  # the cores of seven other GPUs stay free
        (GPU, [LARGE], 8, 8),
        (GPU, [LARGE, SMALL], 8, 8),
        (GPU, [LARGE, SMALL], 9, 4),
        (GPU, [{"CPU": 4.0, "GPU": 8.0}], 4, 0),
        ({**GPU, "gpus_per_worker": 0.25}, [SMALL], 1, 1),
        ({**GPU, "gpus_per_worker": 0.5}, [LARGE], 1, 4),
        (GPU, [{"GPU": 1.0}, {}], 1, 0),
        ({"cpus_per_worker": 4}, [HEAD, SMALL], 5, 4),
        ({"cpus_per_worker": 4}, [HEAD, SMALL], 6, 0),
        ({**GPU, "cpus_per_worker": 8}, [HEAD, SMALL], 1, 0),
    ],
)
def test_a_worker_takes_the_cores_that_go_with_its_gpu(
    keys: dict[str, Any], nodes: list[dict[str, float]], workers: int, expected: int
) -> None:
    assert cores_that_fit(ComputeConfig(**keys), nodes, workers) == expected


@pytest.mark.parametrize(
    ("keys", "workers", "cores", "types", "expected"),
    [
        (
            GPU, 2, 1, [],
            "2 workers at the same time need 1 GPU and 1 core each, on one node for each; the "
            "cluster has no room for them even when idle: 10.0.0.1 has 16 cores; 10.0.0.2, "
            "10.0.0.3, 10.0.0.4 and 1 more have 1 GPU and 4 cores each. Change "
            "compute.num_workers or compute.use_gpu, or add nodes.",
        ),
        (
            {"cpus_per_worker": 32}, 1, 32, [NodeType(HEAD, 3), NodeType(SMALL, None)],
            "a worker needs 32 cores on one node, which no node of the cluster has: 10.0.0.1 has "
            "16 cores; 10.0.0.2, 10.0.0.3, 10.0.0.4 and 1 more have 1 GPU and 4 cores each. Its "
            "autoscaler may add up to 3 nodes of 16 cores; nodes of 1 GPU and 4 cores. Change "
            "compute.cpus_per_worker, or add nodes.",
        ),
    ],
)  # fmt: skip
def test_a_refusal_lists_the_nodes_and_names_the_keys(
    keys: dict[str, Any],
    workers: int,
    cores: int,
    types: list[NodeType],
    expected: str,
) -> None:
    nodes = [Node("10.0.0.1", HEAD), *(Node(f"10.0.0.{i}", SMALL) for i in (2, 3, 4, 5))]
    compute = ComputeConfig(**keys)
    assert misfit(compute, nodes, types, workers=workers, cores=cores) == expected


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({}, True),
        ({"zone": "a"}, True),
        ({"zone": "b"}, False),
        ({"zone": "!b", "disk": "in(ssd, nvme)"}, True),
        ({"disk": "!in(ssd, nvme)"}, False),
        ({"rack": "1"}, False),
        ({"rack": "!1"}, True),
    ],
)
def test_a_node_has_the_labels_or_not(selector: dict[str, str], expected: bool) -> None:
    node = Node("10.0.0.1", {}, labels={"zone": "a", "disk": "ssd"})
    assert has_labels(node, selector) is expected


def test_nodes_are_listed_by_their_labels() -> None:
    nodes = [Node("10.0.0.1", {}, labels={"ray.io/node-id": "f0"})]
    nodes += [Node(f"10.0.0.{i}", {}, labels={"zone": "a", "disk": "ssd"}) for i in (2, 3)]
    assert labels_words(nodes) == "10.0.0.1 has none; 10.0.0.2, 10.0.0.3 have disk=ssd, zone=a"
