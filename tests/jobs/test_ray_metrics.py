"""What jobs export through Ray, as a Prometheus finds it at the node's metrics port."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.request
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gptray.config import Config, override
from gptray.data.tokens import TokenData
from gptray.jobs.cluster.ray_metrics import METRICS, Exporter, run_tag
from gptray.jobs.evaluate.run import evaluate
from gptray.jobs.serve.worker import Replica
from gptray.jobs.train.run import train
from gptray.jobs.tune.run import tune
from tests.jobs.generating import config_of, generate
from tests.tiny import tiny_config

# Only GPUs whose peak is known have a share of it.
NOT_HERE = {"gptray_mfu"}
# Ray's processes pass metrics on every ten seconds.
DEADLINE_S, POLL_S = 60.0, 1.0


class Scraper:
    """Reads the node's metrics all the time, since gauges are gone soon after their job.

    A counter stays for a while after its process: only runs called "watched..." are looked at.
    """

    def __init__(self) -> None:
        import ray

        (node,) = ray.nodes()
        self._url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        self.found: dict[str, list[dict[str, str]]] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow)

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._done.wait(POLL_S):
            self._read()

    def _read(self) -> None:
        with urllib.request.urlopen(self._url, timeout=30) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            if family.name.startswith("ray_gptray_"):
                labels = self.found.setdefault(family.name.removeprefix("ray_"), [])
                labels += [one.labels for one in family.samples if is_watched(one.labels)]

    def wait_for(self, names: set[str]) -> None:
        """Wait until all these have been seen."""
        deadline = time.monotonic() + DEADLINE_S
        while missing := {name for name in names if not self.found.get(name)}:
            assert time.monotonic() < deadline, f"not exported: {missing}"
            self._done.wait(POLL_S)


def is_watched(labels: dict[str, str]) -> bool:
    return labels.get("run", "").startswith("watched")


def test_every_metric_of_the_table_is_exported_by_the_job_that_has_it(
    tiny_data: TokenData, text_file: Path, data_root: Path, model_dir: Path, tmp_path: Path
) -> None:
    config = tiny_config(text_file, data_root, "name=watched-\ucc45", "evaluate.passages=4")
    space = [{"path": "optim.lr", "grid": [0.001, 0.01]}]
    sweep = {"name": "watched-sweep", "tune.space": space, "tune.baseline": False}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "the cat"}) + "\n" for _ in range(200)))
    with Scraper() as scraper:
        train(config)
        tune(override(config, sweep))
        evaluate(config)
        generate(config_of(model_dir, prompts, tmp_path / "watched-rows"))
        asyncio.run(answer_one(model_dir))
        scraper.wait_for(set(METRICS) - NOT_HERE)
    for name, found in scraper.found.items():
        assert {"run", *METRICS[name].tags} <= found[0].keys(), name
    runs = {name: {one["run"] for one in found} for name, found in scraper.found.items()}
    assert "watched-%EC%B1%85" in runs["gptray_val_loss"] & runs["gptray_train_seconds"]
    assert "watched-sweep" in runs["gptray_trials"]
    assert "watched-sweep/0001" in runs["gptray_train_steps"]
    assert runs["gptray_rows"] == {"watched-rows"}
    assert runs["gptray_first_token_seconds"] == {"watched-model"}


async def answer_one(model_dir: Path) -> None:
    """Have a replica complete a prompt; from then on it exports what it counts."""
    replica = Replica(Config(), [], threads=1)
    await replica.reconfigure({"model": str(model_dir), "served_model_name": "watched-model"})
    transport = httpx.ASGITransport(app=replica.__serve_build_asgi_app__())
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        body = {"model": "watched-model", "prompt": "the cat", "max_tokens": 4}
        answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text


def test_a_value_that_was_not_set_is_not_set_again() -> None:
    exporter = Exporter("book")
    with pytest.raises(KeyError):
        exporter.set("gptray_nonsense", 1.0)
    exporter.set_again()


def test_a_run_named_in_any_script_has_metrics() -> None:
    Exporter("\ucc45").set("gptray_max_steps", 1.0)


def test_a_trial_is_tagged_with_its_sweep(tmp_path: Path) -> None:
    assert run_tag(tmp_path / "sweep" / "trials" / "0003") == "sweep/0003"
    assert run_tag(tmp_path / "book") == "book"
