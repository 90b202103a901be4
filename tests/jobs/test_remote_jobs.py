"""All six jobs on a store that is busy or slow in 5 % of calls, each killed and run again."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pyarrow import fs, parquet

from tests.object_store import Object, ObjectStore
from tests.tiny import tiny_text

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

ROOT = Path(__file__).parents[2]
HOME, ROWS = "s3://bucket/runs", 40
WITHIN_S = 1200
WEIGHTS = "model/model.safetensors"
TRAINED = [
    "data.source=s3://bucket/text/tiny.txt", "data.tokenizer=char", "model.n_layer=2",
    "model.n_head=2", "model.n_embd=32", "model.n_positions=32", "model.dropout=0",
    "train.block_size=32", "train.global_batch_size=8", "train.eval_interval=10",
    "train.log_interval=5", "train.precision=fp32", "train.backend=torch",
    "optim.warmup_steps=2", "optim.min_lr=0", "sample.max_new_tokens=4",
    "compute.cpus_per_worker=1",
]  # fmt: skip
RUN = [*TRAINED, "name=r", "train.max_steps=200"]
SWEEP = [
    *TRAINED, "name=s", "train.max_steps=60", "tune.max_concurrent_trials=1",
    "tune.baseline=false", "tune.space=[{path: optim.lr, grid: [1e-3, 1e-2, 3e-3]}]",
]  # fmt: skip
TORCH = ["generate.backend=torch", "generate.precision=fp32"]


class Jobs:
    """Jobs as processes; each machine has a home and a cache of its own."""

    def __init__(self, store: ObjectStore, folder: Path) -> None:
        self._store, self._folder, self._numbers = store, folder, itertools.count()

    def command(self, job: str, words: list[str], home: str = HOME) -> list[str]:
        return [sys.executable, str(ROOT / f"jobs/{job}.py"), f"storage_path={home}", *words]

    def machine(self) -> dict[str, str]:
        place = self._folder / f"machine{next(self._numbers)}"
        return {**os.environ, "HOME": str(place), "XDG_CACHE_HOME": str(place / "cache")}

    def killed(self, job: str, words: list[str], until: Callable[[str], bool]) -> None:
        """Start a job; kill it once that holds of what it has told."""
        log = self._folder / f"{job}.log"
        with log.open("w") as file:
            started = subprocess.Popen(
                self.command(job, words), env=self.machine(), stdout=file, stderr=file
            )
        deadline = time.monotonic() + WITHIN_S
        try:
            while not until(log.read_text()):
                assert time.monotonic() < deadline and started.poll() is None, log.read_text()
                with self._store.stored:
                    self._store.stored.wait(0.2)  # for the next object
        finally:
            started.kill()
        assert started.wait() == -9, log.read_text()

    def done(self, job: str, words: list[str], home: str = HOME) -> dict[str, Any]:
        """Run a job to its end; return its JSON line."""
        ended = subprocess.run(
            self.command(job, words, home), env=self.machine(), capture_output=True, text=True,
            timeout=WITHIN_S,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        line: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return line

    def left(self, pattern: str) -> int:
        """How many files and folders the caches of all machines hold of a kind."""
        return len(list(self._folder.glob(f"machine*/cache/gptray/{pattern}")))

    @contextmanager
    def serving(self) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """The endpoint, and what it completes."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = ["serve.model=r", f"serve.port={port}", *TORCH]
        process = subprocess.Popen(
            self.command("serve", words), env=self.machine(), stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout
            url = json.loads(process.stdout.readline())["url"]
            body = {"prompt": "the cat", "max_tokens": 8, "seed": 3}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=WITHIN_S)
            yield process, answer.json()["choices"][0]["text"]
        finally:
            process.kill()
            process.communicate()


@pytest.fixture
def jobs(store: ObjectStore, tmp_path: Path) -> Jobs:
    store.busy_each = store.slow_each = 20
    store.slow_s = 0.5
    store.objects["bucket/text/tiny.txt"] = Object(tiny_text(600).encode())
    prompts = [json.dumps({"id": number, "prompt": f"the cat {number}"}) for number in range(ROWS)]
    store.objects["bucket/in/p.jsonl"] = Object("\n".join(prompts).encode())
    return Jobs(store, tmp_path)


def test_every_job_killed_and_run_again_leaves_what_an_undisturbed_one_does(
    jobs: Jobs, store: ObjectStore, tmp_path: Path
) -> None:
    jobs.killed("prepare", TRAINED, lambda told: has(store, "runs/data/"))
    assert jobs.done("prepare", TRAINED)["tokens"]["val"] > 0

    jobs.killed("train", RUN, lambda told: has(store, "runs/r/checkpoint_"))
    trained = jobs.done("train", RUN)
    calm = jobs.done("train", RUN, str(tmp_path / "calm"))
    assert trained["val_loss"] == calm["val_loss"]
    weights = (tmp_path / "calm/r" / WEIGHTS).read_bytes()
    assert store.objects[f"bucket/runs/r/{WEIGHTS}"].content == weights

    jobs.killed("tune", SWEEP, lambda told: bool(ended_trials(store)))
    ended = ended_trials(store)
    assert "winner" not in [event["event"] for event in events(store)]
    swept = jobs.done("tune", SWEEP)
    starts = [event["trial"] for event in events(store) if event["event"] == "started"]
    assert all(starts.count(name) == 1 for name in ended)
    calm = jobs.done("tune", SWEEP, str(tmp_path / "calm"))
    same = ("best_trial", "best_val_loss", "steps_run", "outcomes")
    assert [swept[key] for key in same] == [calm[key] for key in same]
    weights = (tmp_path / "calm/s" / WEIGHTS).read_bytes()
    assert store.objects[f"bucket/runs/s/{WEIGHTS}"].content == weights

    evaluation = ["evaluate.model=r", "evaluate.passages=2"]
    jobs.killed("evaluate", evaluation, lambda told: "train  loss" in told)
    evaluated = jobs.done("evaluate", evaluation)
    assert evaluated["evaluation"] == f"{HOME}/r/evaluation.json"
    stored = json.loads(store.objects["bucket/runs/r/evaluation.json"].content)
    assert stored["splits"]["val"]["loss"] == evaluated["val_loss"]
    assert evaluated["val_loss"] == pytest.approx(trained["val_loss"], rel=1e-5)

    rows = [
        "generate.model=r", "generate.input_path=s3://bucket/in/p.jsonl",
        "generate.output_path=s3://bucket/out", "sample.max_new_tokens=8",
        "generate.max_batch_size=4", "generate.rows_per_file=8", *TORCH,
    ]  # fmt: skip
    jobs.killed("generate", rows, lambda told: has(store, "out/part-"))
    assert jobs.done("generate", rows)["rows"] == ROWS
    filesystem, path = fs.FileSystem.from_uri("s3://bucket/out")
    ids = parquet.read_table(path, filesystem=filesystem)["id"].to_pylist()
    assert sorted(ids) == list(range(ROWS))
    # By the kill, a folder and its lock: a node's cache removes the folder one day.
    assert (jobs.left("engines/*/"), jobs.left("engines/*")) == (1, 2)

    texts = []
    for _ in range(2):  # the first is killed, as is the second at the end
        with jobs.serving() as (_, text):
            texts.append(text)
    assert texts[0] == texts[1]

    kinds = {run["name"]: run["state"] for run in jobs.done("runs", [])["runs"]}
    assert kinds == {"r": "finished", "s": "finished, 3 trials"}
    names = store.names("bucket")
    print(
        *(f"{len(store.objects[f'bucket/{name}'].content):9,} {name}" for name in names), sep="\n"
    )
    assert not [name for name in names if "lease" in name]


def has(store: ObjectStore, start: str) -> bool:
    """Whether the store has an object whose name begins so."""
    return any(name.startswith(f"bucket/{start}") for name in [*store.objects])


def events(store: ObjectStore) -> list[dict[str, Any]]:
    """The record of the sweep in the store."""
    record = store.objects.get("bucket/runs/s/trials.jsonl", Object(b""))
    return [json.loads(line) for line in record.content.splitlines()]


def ended_trials(store: ObjectStore) -> set[str]:
    return {event["trial"] for event in events(store) if event["event"] == "ended"}
