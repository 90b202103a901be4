"""Which nodes workers may run on by their labels, and how many trials a growing cluster gets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.jobs.nodes import LIMIT_S, cluster_of

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("nodes")]
# What the driver of a job works out, in a process of its own.
ASK = """
import json, sys
import ray
from gptray.config import ComputeConfig, UserError
from gptray.jobs.resources import trial_resources, worker_resources

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


def asked(*computes: dict[str, Any]) -> list[Any]:
    command = [sys.executable, "-c", ASK, json.dumps(computes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="module")
def fixed() -> Iterator[None]:
    with cluster_of(
        {"num_cpus": 3, "labels": {"zone": "a"}}, {"num_cpus": 1, "labels": {"zone": "b"}}
    ):
        yield


def test_workers_run_on_nodes_with_their_labels_or_not_at_all(fixed: None) -> None:
    there, other, nowhere = asked(
        {"label_selector": ["zone=a"]},
        {"label_selector": ["zone=!a"]},
        {"label_selector": ["zone=c"], "accelerator_type": "H100"},
    )
    assert there[0] == {"CPU": 3.0} and other[0] == {"CPU": 1.0}
    assert there[1] == [3, {"CPU": 1.0}]
    assert nowhere.startswith(
        "no node of the cluster has the labels zone=c, ray.io/accelerator-type=H100: "
    )
    assert "has zone=a" in nowhere and "has zone=b" in nowhere
    assert nowhere.endswith(
        "Change compute.label_selector or compute.accelerator_type, or add nodes"
    )


def test_a_sweep_asks_a_growing_cluster_for_all_trials_and_waits_for_nodes() -> None:
    with cluster_of({"num_cpus": 1, "labels": {"ray.io/node-group": "small"}}):
        plain, labelled = asked({}, {"label_selector": ["zone=c"]})
    assert plain[1] == [16, {"CPU": 1.0}]
    assert labelled[0] == {"CPU": 1.0}  # a node that has them may come
