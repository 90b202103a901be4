"""Jobs that choose nodes, or find no room: refused for good, or waiting until there is some.

The head has no core, one node has a GPU as Ray counts them, another a core.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import SIGINT, SIGTERM
from subprocess import CompletedProcess

import pytest

from gptray.jobs.cluster.waiting import shortage
from tests.jobs.in_turn import Driver, driver
from tests.jobs.nodes import LIMIT_S, asked, cluster_of, free_port, job, line_with

pytestmark = pytest.mark.xdist_group("nodes")
HOLDS = """
import ray
ray.init(log_to_driver=False, logging_level="ERROR")
group = ray.util.placement_group([{"CPU": 2, "GPU": 1}, {"CPU": 1}])
assert group.wait(60)
print("held", flush=True)
input()
"""
FREE = [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.0}]


@pytest.mark.parametrize(
    ("awaited", "free", "expected"),
    [
        ([{"CPU": 1.0}], [{}, {}], "1 core: the cluster has 1 GPU and 3 cores, 0 GPUs and 0 cores"),
        ([{"CPU": 2.0}] * 2, FREE, "2 cores for each of 2 workers: the cluster has 1 GPU and 3"),
        ([{"CPU": 1.0, "GPU": 1.0}], [{"CPU": 1.0}], "1 GPU and 1 core: the cluster has"),
        ([{"CPU": 1.0}, {"GPU": 0.5}], [], "0.5 GPUs and 1 core: the cluster has"),
    ],
)
def test_a_wait_says_what_is_awaited_and_what_is_free(
    awaited: list[dict[str, float]], free: list[dict[str, float]], expected: str
) -> None:
    assert shortage(awaited, FREE, free).startswith(expected)


def test_where_no_gpu_matters_none_is_counted() -> None:
    text = shortage([{"CPU": 2.0}], [{"CPU": 2.0}, {}], [{"CPU": 1.0}, {}])
    assert text == "2 cores: the cluster has 2 cores, 1 core free"


def test_room_on_several_nodes_is_told_apart_from_room_on_one() -> None:
    text = shortage([{"CPU": 3.0}], FREE, FREE)
    assert text.endswith("1 GPU and 3 cores free, not together on one node")


@pytest.fixture(scope="module")
def jobs() -> Iterator[Driver]:
    """Run a cluster; what runs jobs on it."""
    of_a, of_b = {"labels": {"zone": "a"}}, {"labels": {"zone": "b"}}
    nodes = {"num_cpus": 0}, {"num_cpus": 2, "num_gpus": 1, **of_a}, {"num_cpus": 1, **of_b}
    with cluster_of(*nodes), driver() as running:
        yield running


@pytest.fixture(scope="module")
def words(jobs: Driver, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What jobs are to be told. Their text is prepared."""
    storage = tmp_path_factory.mktemp("storage")
    words = [f"storage_path={storage}", "train.max_steps=2", "train.block_size=32"]
    words += ["model.n_layer=1", "model.n_embd=32", "data.vocab_size=300", "train.backend=torch"]
    prepared = jobs.run("prepare", *words)
    assert prepared.returncode == 0, prepared.stderr
    return words


@contextmanager
def held() -> Iterator[None]:
    """Have another job that holds all of the cluster."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        try:
            yield
        finally:
            other.communicate("\n", timeout=LIMIT_S)


@pytest.mark.ray
def test_workers_run_on_nodes_with_their_labels_or_not_at_all(jobs: Driver) -> None:
    there, other, nowhere = asked(
        {"label_selector": ["zone=a"]},
        {"label_selector": ["zone=!a"]},
        {"label_selector": ["zone=c"], "accelerator_type": "H100"},
    )
    assert there[0] == {"CPU": 2.0} and other[0] == {"CPU": 1.0}
    assert there[1] == [2, {"CPU": 1.0}]
    assert nowhere.startswith(
        "no node of the cluster has the labels zone=c, ray.io/accelerator-type=H100: "
    )
    assert "has zone=a" in nowhere and "has zone=b" in nowhere
    assert nowhere.endswith(
        "Change compute.label_selector or compute.accelerator_type, or add nodes"
    )


@pytest.mark.ray
def test_more_gpus_than_there_are_is_a_mistake(jobs: Driver, words: list[str]) -> None:
    done = jobs.run("train", *words, "compute.use_gpu=true", "compute.num_workers=2")
    assert done.returncode == 2
    assert "2 workers at the same time need 1 GPU and 1 core each" in done.stderr
    assert "has 1 GPU and 2 cores" in done.stderr and "has 1 core" in done.stderr


@pytest.mark.ray
def test_a_wait_ends_after_wait_s(jobs: Driver, words: list[str], model_dir: Path) -> None:
    awaited = {"prepare": "1 core:", "train": "2 cores:", "tune": "1 core", "serve": "2 cores:"}
    words = [*words, f"serve.model={model_dir}", "generate.backend=torch", "compute.wait_s=2"]
    words += [f"serve.port={free_port()}", "tune.space=[{path: optim.lr, choice: [1e-3, 2e-3]}]"]
    other_text = ["data.seed=2"]  # other shares than are prepared
    with held():
        ended = {
            name: jobs.run(name, *words, f"name={name}", *(other_text if name == "prepare" else []))
            for name in ("prepare", "train", "tune")
        }
        with job("serve", *words, "name=serve") as process:  # which ends its process at once
            told = process.communicate(timeout=LIMIT_S)[1]
        ended["serve"] = CompletedProcess(["serve"], process.returncode, "", told)
    for name, done in ended.items():
        assert done.returncode == 1, done.stderr
        assert f"{name}: waited compute.wait_s=2 s for {awaited[name]}" in done.stderr
        assert "the cluster has 1 GPU and 3 cores, 0 GPUs and 0 cores free" in done.stderr


@pytest.mark.ray
def test_a_waiting_training_ends_by_signals_and_starts_when_there_is_room(
    words: list[str],
) -> None:
    waits = "waiting for 2 cores: the cluster has 1 GPU and 3 cores, 0 GPUs and 0 cores free; job "
    with ExitStack() as other:
        other.enter_context(held())
        signalled = {
            number: other.enter_context(job("train", *words, f"name=by-{number}"))
            for number in (SIGINT, SIGTERM)
        }
        for number, process in signalled.items():
            line = line_with("waiting for 2 cores", process)
            assert waits in line and line.endswith(") holds 1 GPU and 3 cores\n")
            process.send_signal(number)
            told = process.communicate(timeout=LIMIT_S)[1]
            assert process.returncode == 130 and "killed" not in told, told
        with job("train", *words, "name=two") as process:
            line_with("waiting for", process)
            other.close()
            line_with("there is room now", process)
            _, told = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, told
