"""Jobs on a cluster of two nodes with a core each: more asked than there is, and a node lost."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from gptray.model.hf import save_pretrained
from tests.generation.models import needs_native, random_gpt, small_tokenizer
from tests.jobs.in_turn import LIMIT_S, Driver, driver
from tests.jobs.nodes import Nodes, cluster_of, job
from tests.processes import ray_workers
from tests.tiny import tiny_text

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("nodes")]
ROWS, ROWS_PER_FILE = 144, 4
PARTS = ROWS // ROWS_PER_FILE


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Nodes, list[Any]]]:
    with cluster_of({"num_cpus": 1}, {"num_cpus": 1}) as running:
        yield running


@pytest.fixture(scope="module")
def jobs(cluster: tuple[Nodes, list[Any]]) -> Iterator[Driver]:
    """What runs jobs on the cluster while it is whole."""
    with driver() as running:
        yield running


@pytest.fixture(scope="module")
def slow_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model large enough for a job to be caught halfway."""
    folder, tokenizer = tmp_path_factory.mktemp("slow"), small_tokenizer()
    model = random_gpt(tokenizer, n_positions=256, n_layer=4, n_embd=64, n_head=4)
    save_pretrained(model, folder, eos_token_id=tokenizer.eos_id)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"the cat {i}"}) + "\n" for i in range(ROWS)))
    return path


def generate_words(model: Path, prompts: Path, output: Path, engines: int) -> list[str]:
    return [
        f"generate.model={model}",
        f"generate.input_path={prompts}",
        f"generate.output_path={output}",
        f"generate.num_workers={engines}",
        f"generate.rows_per_file={ROWS_PER_FILE}",
        "generate.max_batch_size=4",
        "generate.precision=fp32",
        "generate.backend=torch",
        "sample.max_new_tokens=64",
        "sample.min_new_tokens=64",
    ]


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON line of a job that has ended well."""
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def rows_of(output: Path) -> list[dict[str, Any]]:
    tables = [parquet.read_table(path) for path in sorted(output.glob("*.parquet"))]
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return rows


@pytest.fixture(scope="module")
def by_four(
    jobs: Driver,
    slow_model_dir: Path,
    prompts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    """The rows of a job that asked for twice as many engines as there are cores."""
    output = tmp_path_factory.mktemp("four") / "out"
    result = result_of(jobs.run("generate", *generate_words(slow_model_dir, prompts, output, 4)))
    assert result["rows"] == ROWS and result["tokens_per_sec"] > 0
    return rows_of(output)


def test_more_engines_than_cores_still_finish_all_rows(by_four: list[dict[str, Any]]) -> None:
    assert [row["id"] for row in by_four] == list(range(ROWS))


@needs_native
def test_engines_on_several_nodes_use_one_backend_that_is_told_once(
    jobs: Driver, model_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    words = [f"generate.model={model_dir}", f"generate.input_path={prompts}"]
    words += [f"generate.output_path={tmp_path / 'out'}", "generate.num_workers=2"]
    words += ["generate.rows_per_file=72", "generate.max_batch_size=4", "sample.max_new_tokens=2"]
    done = jobs.run("generate", *words)
    result_of(done)
    assert done.stderr.count("generate.backend: ") == 1
    metadata = [
        parquet.read_metadata(path).metadata for path in (tmp_path / "out").glob("*.parquet")
    ]
    settings = {json.loads(one[b"gptray.settings"])["generate.backend"] for one in metadata}
    assert len(settings) == 1 and settings <= {"native", "torch"}


def test_more_workers_than_cores_evaluate_to_the_same_numbers(
    jobs: Driver, model_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "text.txt"
    source.write_text(tiny_text(4000))
    results = []
    for workers in (4, 1):
        words = [f"evaluate.model={model_dir}", f"evaluate.source={source}", "evaluate.passages=4"]
        words += [f"storage_path={tmp_path}", "name=e", f"compute.num_workers={workers}"]
        results.append(result_of(jobs.run("evaluate", *words)))
    assert results[0]["test_loss"] > 0 and results[0] == results[1]


def test_a_lost_node_costs_neither_rows_nor_the_job(
    cluster: tuple[Nodes, list[Any]],
    slow_model_dir: Path,
    prompts: Path,
    tmp_path: Path,
    by_four: list[dict[str, Any]],
) -> None:
    nodes, started = cluster
    output = tmp_path / "out"
    with job("generate", *generate_words(slow_model_dir, prompts, output, 2)) as process:
        deadline = time.monotonic() + LIMIT_S
        # Some files more than there are when both engines run: both have parts by then.
        wanted, there = None, 0
        while wanted is None or there < wanted:
            there = len(list(output.glob("*.parquet")))
            if wanted is None and len(ray_workers("EngineWorker")) == 2:
                wanted = max(PARTS // 3, there + 3)
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
            assert process.poll() is None and time.monotonic() < deadline
        nodes.kill(started.pop())
        assert there < PARTS, "all was done before the node was lost"
        _, told = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, told
    assert "1 of 2 engines died; its work goes to another" in told
    assert rows_of(output) == by_four
    assert not list(output.glob(".part*"))
