"""How many cores a worker reserves on clusters of different nodes."""

from __future__ import annotations

from typing import Any

import pytest

from gptray.config import ComputeConfig
from gptray.jobs.resources import cores_that_fit

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
    ],
)
def test_a_worker_takes_the_cores_that_go_with_its_gpu(
    keys: dict[str, Any], nodes: list[dict[str, float]], workers: int, expected: int
) -> None:
    assert cores_that_fit(ComputeConfig(**keys), nodes, workers) == expected
