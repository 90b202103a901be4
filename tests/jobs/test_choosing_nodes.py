"""Which nodes workers may run on by their labels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.jobs.nodes import asked, cluster_of

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("nodes")]


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
