"""Jobs on clusters that grow: what may come is known, what never can is refused, the rest comes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gptray.jobs.cluster.autoscaler import NodeType, configured_types, types_in, types_words
from gptray.tuning.sweep_record import TRIALS
from tests.jobs.autoscaling import autoscaling, cluster_yaml
from tests.jobs.nodes import LIMIT_S, asked, job

SMALL, LARGE = {"CPU": 4.0}, {"CPU": 64, "GPU": 8}


@pytest.mark.parametrize(
    ("types", "most_in_all", "expected"),
    [
        ({"small": (SMALL, 3), "large": (LARGE, 1)}, 8, [NodeType(SMALL, 3), NodeType(LARGE, 1)]),
        ({"small": (SMALL, 30)}, 8, [NodeType(SMALL, 8)]),
        ({"small": (SMALL, 3), "large": (LARGE, 0)}, 8, [NodeType(SMALL, 3)]),
        ({"small": (SMALL, 3)}, 0, []),
        ({}, 8, []),
        ({"small": (SMALL, 3), "unknown": ({}, 1)}, 8, None),
    ],
)
def test_the_types_that_may_come_are_read_from_a_cluster_yaml(
    types: Mapping[str, tuple[Mapping[str, float], int]],
    most_in_all: int,
    expected: list[NodeType] | None,
) -> None:
    assert types_in({**cluster_yaml({"CPU": 16}, types), "max_workers": most_in_all}) == expected


def test_a_type_without_a_limit_of_its_own_has_that_of_the_cluster() -> None:
    config = cluster_yaml({"CPU": 16}, {"small": (SMALL, 3)})
    del config["available_node_types"]["small"]["max_workers"]
    assert types_in(config) == [NodeType(SMALL, 8)]


def test_the_file_of_a_running_autoscaler_is_found_by_its_cluster(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps(cluster_yaml({"CPU": 16}, {"small": (SMALL, 3)})))
    command = [sys.executable, "-c", "print(flush=True); input()"]
    command += ["--gcs-address=10.0.0.1:6379", f"--autoscaling-config={file}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"\n"
        assert configured_types("10.0.0.1:6379") == [NodeType(SMALL, 3)]
        assert configured_types("10.0.0.2:6379") is None  # of another cluster
        process.communicate(b"\n", timeout=LIMIT_S)
    assert configured_types("10.0.0.1:6379") is None


def test_types_are_listed_by_what_they_have() -> None:
    types = [NodeType(SMALL, 3), NodeType(LARGE, 1), NodeType({"CPU": 2.0}, None)]
    assert types_words(types) == (
        "up to 3 nodes of 4 cores; up to 1 node of 8 GPUs and 64 cores; nodes of 2 cores"
    )


@pytest.mark.ray
@pytest.mark.xdist_group("nodes")
@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.chaos), 2])
def test_what_may_come_is_counted_on_and_what_never_can_is_refused(
    version: int, tmp_path: Path
) -> None:
    with autoscaling(tmp_path, 1, {"small": ({"CPU": 2}, 3)}, version):
        plain, labelled, two, four, large, gpu = asked(
            {},
            {"label_selector": ["zone=c"]},
            {"num_workers": 2},
            {"num_workers": 4},
            {"cpus_per_worker": 8},
            {"use_gpu": True},
        )
    assert plain == [{"CPU": 1.0}, [16, {"CPU": 1.0}]]  # all trials: those without room wait
    assert labelled[0] == {"CPU": 2.0}  # a node that has them may come
    assert two[1] == [16, {"CPU": 2.0}]  # on two nodes
    assert four[1] == [16, {"CPU": 1.0}]  # the head's core counts
    for refused in (large, gpu):
        assert "no node of the cluster has" in refused and "has 1 core." in refused
        assert "Its autoscaler may add up to 3 nodes of 2 cores." in refused


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.xdist_group("nodes")
@pytest.mark.parametrize("version", [1, 2])
def test_a_sweep_waits_for_nodes_and_uses_those_that_come(
    version: int, source: Path, tmp_path: Path
) -> None:
    words = [f"storage_path={tmp_path}", f"data.source={source}", "train.max_steps=40"]
    words += ["train.block_size=32", "model.n_layer=1", "model.n_embd=32", "data.vocab_size=300"]
    words += ["tune.num_samples=4", "tune.grace_period=40", "train.backend=torch"]
    words += ["tune.space=[{path: optim.lr, choice: [1e-3, 2e-3, 3e-3, 4e-3]}]"]
    with autoscaling(tmp_path, 0, {"small": ({"CPU": 1}, 2)}, version):
        result, told = _end_of("tune", *words)
    assert result["trials"] == 4
    assert "waiting for 1 core" in told
    assert _most_at_once(Path(result["report"]).parent) == 2


def _end_of(name: str, *words: str) -> tuple[dict[str, Any], str]:
    with job(name, *words) as process:
        out, told = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, told
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result, told


def _most_at_once(sweep: Path) -> int:
    """How many of a sweep's trials ran at the same time."""
    running: set[str] = set()
    most = 0
    for line in (sweep / TRIALS).read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "started":
            running.add(event["trial"])
        elif event["event"] == "ended":
            running.discard(event["trial"])
        most = max(most, len(running))
    return most
