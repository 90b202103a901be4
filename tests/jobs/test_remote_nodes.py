"""Jobs whose home is an object store, on two nodes that share no disk."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs, parquet

from tests.jobs.test_remote_jobs import HOME, TRAINED, WEIGHTS
from tests.jobs.two_nodes import NAME, may_unshare, two_nodes
from tests.object_store import Object, ObjectStore, object_store
from tests.tiny import tiny_text

WITHIN_S, ROWS = 500, 8
pytestmark = [
    pytest.mark.ray,
    pytest.mark.xdist_group("nodes"),
    pytest.mark.timeout(3 * WITHIN_S),
    pytest.mark.skipif(not may_unshare(), reason="takes the right to unshare -m"),
]
ROOT = Path(__file__).parents[2]
STEPS = 100
# At its end it lands: every node reads the best checkpoint, which one of them wrote.
LANDS = "optim.schedule=wsd"
RUN = [*TRAINED, "name=r", f"train.max_steps={STEPS}", "compute.num_workers=2", LANDS]
FIRST = re.compile("bucket/runs/r/checkpoint_[0-9]+/manifest.json")
# The driver is on the first node.
ON_SECOND = f"compute.label_selector=[node={NAME}]"


@dataclass
class Nodes:
    """A cluster of two nodes, and the store that both see."""

    store: ObjectStore
    environment: Mapping[str, str]
    folder: Path

    def job(
        self, name: str, *words: str, place: str = HOME, **environment: str
    ) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / f"jobs/{name}.py"), f"storage_path={place}", *words]
        return subprocess.Popen(
            command, env={**self.environment, **environment}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def done(self, name: str, *words: str, place: str = HOME, **environment: str) -> dict[str, Any]:
        """Run a job to its end; return its JSON line."""
        job = self.job(name, *words, place=place, **environment)
        try:
            out, told = job.communicate(timeout=WITHIN_S)
        finally:
            job.kill()
        assert job.returncode == 0, told
        line: dict[str, Any] = json.loads(out.splitlines()[-1])
        return line

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a file of JSON lines in the store."""
        content = self.store.objects[f"bucket/runs/{name}"].content
        return [json.loads(line) for line in content.splitlines()]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder, cache = tmp_path_factory.mktemp("nodes"), tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch, object_store(patch, cache) as store:
        store.objects["bucket/text/tiny.txt"] = Object(tiny_text(600).encode())
        with two_nodes([cache], folder, cores=1, size="256m") as environment:
            yield Nodes(store, environment, folder)


def test_a_run_of_two_nodes_that_is_killed_ends_with_the_bits_of_one_node(nodes: Nodes) -> None:
    store, deadline = nodes.store, time.monotonic() + WITHIN_S
    job = nodes.job("train", *RUN)
    try:
        while not any(FIRST.fullmatch(name) for name in [*store.objects]):
            assert time.monotonic() < deadline and job.poll() is None
            with store.stored:
                store.stored.wait(0.2)  # for the next object
    finally:
        job.kill()
        _, told = job.communicate()
    assert job.returncode == -9, told
    # The driver sent them there; so the other node has fetched them.
    assert any(call.startswith("GET /bucket/runs/data/") for call in store.calls)
    # The next driver has nothing of all this.
    trained = nodes.done("train", *RUN, XDG_CACHE_HOME=str(nodes.folder / "other driver"))
    place = nodes.folder / "calm"
    calm = nodes.done("train", *RUN, place=str(place), RAY_ADDRESS="")
    assert trained["val_loss"] == calm["val_loss"] and trained["landed"]
    assert store.objects[f"bucket/runs/r/{WEIGHTS}"].content == (place / "r" / WEIGHTS).read_bytes()
    last = f"r/checkpoint_{STEPS:06}/optimizer.safetensors"
    assert store.objects[f"bucket/runs/{last}"].content == (place / last).read_bytes()
    steps = [row["step"] for row in nodes.rows("r/metrics.jsonl")]
    assert steps == sorted({*range(5, STEPS + 1, 5), 83})  # 83: the last before it lands
    starts = [event for event in nodes.rows("r/events.jsonl") if event["event"] == "start"]
    assert len(starts) == 2 and starts[1]["step"] > 0
    assert not [name for name in store.names("bucket") if "lease" in name]


def test_a_sweep_trains_on_a_node_without_its_folder(nodes: Nodes) -> None:
    words = [
        *TRAINED, "name=s", "train.max_steps=20", "tune.baseline=false", "tune.grace_period=4",
        ON_SECOND,
        "tune.space=[{path: optim.lr, grid: [1e-3, 1e-2]}]",
    ]  # fmt: skip
    swept = nodes.done("tune", *words)
    assert (swept["trials"], swept["outcomes"]["finished"]) == (2, 2)
    objects, best = nodes.store.objects, swept["best_trial"]
    for name in ("0000", "0001"):
        rows = nodes.rows(f"s/trials/{name}/metrics.jsonl")
        assert [row["step"] for row in rows] == [5, 10, 15, 20]
        events = [event["event"] for event in nodes.rows(f"s/trials/{name}/events.jsonl")]
        assert events == ["start", "evaluated", "evaluated", "end"]
        assert f"bucket/runs/s/trials/{name}/checkpoint_000020/manifest.json" in objects
    weights = objects[f"bucket/runs/s/{WEIGHTS}"].content
    assert weights == objects[f"bucket/runs/s/trials/{best}/{WEIGHTS}"].content


def test_a_run_is_scored_evaluated_and_used_on_the_other_node(nodes: Nodes) -> None:
    words = [*TRAINED, "name=v", "train.max_steps=20", "train.async_validation=true"]
    trained = nodes.done("train", *words)
    scored = [row["step"] for row in nodes.rows("v/metrics.jsonl") if "val_loss" in row]
    assert scored == [10, 20]

    words = ["evaluate.model=v", "evaluate.passages=2", "compute.cpus_per_worker=1", ON_SECOND]
    evaluated = nodes.done("evaluate", *words)
    assert evaluated["val_loss"] == pytest.approx(trained["val_loss"], rel=1e-5)

    prompts = [json.dumps({"id": number, "prompt": "the cat"}) for number in range(ROWS)]
    nodes.store.objects["bucket/in/p.jsonl"] = Object("\n".join(prompts).encode())
    words = [
        "generate.model=v", "generate.input_path=s3://bucket/in/p.jsonl", "generate.num_workers=2",
        "generate.output_path=s3://bucket/out", "sample.max_new_tokens=8",
        "generate.rows_per_file=2", "generate.backend=torch", "compute.cpus_per_worker=1",
    ]  # fmt: skip
    assert nodes.done("generate", *words)["rows"] == ROWS
    filesystem, path = fs.FileSystem.from_uri("s3://bucket/out")
    ids = parquet.read_table(path, filesystem=filesystem)["id"].to_pylist()
    assert sorted(ids) == list(range(ROWS))
