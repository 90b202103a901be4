"""A run on a node that does not see the driver's folder, and what the driver has of it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptray.config import Config, RunFailed
from gptray.data.request import make_request
from gptray.data.tokens import TokenData
from gptray.evaluation.recitation import LENGTHS, ngram_hashes
from gptray.jobs.cluster.tasks import result_of
from gptray.jobs.evaluate.worker import Call, EvaluationTask, Scorer
from gptray.jobs.folders.driver_folder import BLOCK_BYTES, DriverFolder
from gptray.jobs.folders.fetching import fetch_run
from gptray.jobs.folders.origin import FolderAtDriver
from gptray.jobs.folders.publisher import Sent
from gptray.jobs.folders.remote_data import publish_data, tokens_here
from gptray.jobs.train.node_run import NodePublisher, needed_by_writer
from gptray.storage.manifest import MANIFEST
from gptray.storage.record import EVENTS, METRICS, read_events, read_metrics, write_event
from gptray.training.checkpoint import checkpoint_step, damage, find_checkpoints
from gptray.training.loop import fit
from tests.jobs.interrupted import STEPS, Killed, config_in, what_it_came_to
from tests.jobs.interrupted import job as local_job
from tests.jobs.test_remote_run import HOME, config_at, prepare
from tests.object_store import ObjectStore


class Driver:
    """The driver's side of a run, called as its actor is; `look` at it after each call."""

    def __init__(self, folder: Path, look: Callable[[], object] = lambda: None) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._look = DriverFolder(folder), look

    def __call__(self, method: str, *arguments: object) -> object:
        answer = result_of(self._folder.call(method, *arguments))
        self._look()
        return answer

    def new_writer(self) -> FolderAtDriver:
        number = self("begin", "")
        assert isinstance(number, int)
        return FolderAtDriver(self, ("", number), "")


@pytest.fixture
def config(tmp_path: Path, source: Path) -> Config:
    config = config_in(tmp_path / "storage")
    prepare(config)
    return config


def train(config: Config, driver: Driver, node: Path, *, lost_at: int | None = None) -> None:
    """Train or resume on a node; or lose the node once the checkpoint of a step has been sent."""
    place = driver.new_writer()
    publisher = NodePublisher(place, node, fetch_run(place, node, needed_by_writer(place)))

    def report(metrics: dict[str, object], checkpoint: Path | None) -> None:
        publisher.publish()
        if metrics["step"] == lost_at:
            raise Killed

    result = fit(
        config, TokenData.open(make_request(config).data_dir), node, report=report,
        sample=lambda model: [("p", "o")], device=torch.device("cpu"),
    )  # fmt: skip
    assert result["stopped"] == "max_steps"
    publisher.publish()


def test_a_run_that_moves_to_another_node_ends_at_the_driver_with_the_same_bits(
    config: Config, tmp_path: Path
) -> None:
    folder, seen = tmp_path / "r", Counter[int]()

    def look() -> None:
        """Whatever is seen there can be resumed from."""
        for checkpoint in find_checkpoints(folder):
            step = checkpoint_step(checkpoint)
            assert step and damage(checkpoint) is None
            assert step <= read_metrics(folder)[-1]["step"]
            seen[step] += 1
        told = [one["step"] for one in read_events(folder) if one["event"] == "evaluated"]
        assert {*told} <= {*seen}

    driver = Driver(folder, look)
    with pytest.raises(Killed):
        train(config, driver, tmp_path / "node1", lost_at=4)
    write_event(folder, "failure", message="a node was lost")  # by the driver
    train(config, driver, tmp_path / "node2")
    local_job(config)
    local = tmp_path / "storage/r"
    assert what_it_came_to(folder) == what_it_came_to(local)
    assert [row["step"] for row in read_metrics(folder)] == [*range(1, STEPS + 1)]
    assert {*seen} == {2, 4, 6}
    told = Counter(event["event"] for event in read_events(folder))
    assert told == {"start": 2, "evaluated": 3, "failure": 1}
    assert len([*folder.glob("tensorboard/*/train/events.out.*")]) == 2
    names = {path.name for path in folder.iterdir() if path.name != "tensorboard"}
    assert names == {METRICS, EVENTS, "model", *(f"checkpoint_{step:06}" for step in (2, 4, 6))}


def test_a_checkpoint_that_comes_while_others_are_sent_is_seen_whole(
    config: Config, tmp_path: Path
) -> None:
    node, aside = tmp_path / "node", tmp_path / "aside"
    train(config, Driver(tmp_path / "first"), node)
    last = find_checkpoints(node)[-1]
    last.rename(aside)

    def look() -> None:
        if find_checkpoints(tmp_path / "r") and aside.exists():
            aside.rename(last)
        assert all(damage(one) is None for one in find_checkpoints(tmp_path / "r"))

    place = Driver(tmp_path / "r", look).new_writer()
    publisher = NodePublisher(place, node, Sent())
    publisher.publish()
    assert not aside.exists()
    publisher.publish()
    assert len(find_checkpoints(tmp_path / "r")) == len(find_checkpoints(node)) == 3


def test_checkpoints_that_the_writer_removes_go_at_the_driver_too(
    config: Config, tmp_path: Path
) -> None:
    driver = Driver(tmp_path / "r")
    with pytest.raises(Killed):
        train(config, driver, tmp_path / "node1", lost_at=4)
    compute = config.compute.model_copy(update={"num_to_keep": 1})
    train(config.model_copy(update={"compute": compute}), driver, tmp_path / "node2")
    kept = [path.name for path in (tmp_path / "node2").glob("checkpoint_*")]
    assert sorted(path.name for path in (tmp_path / "r").glob("checkpoint_*")) == sorted(kept)
    assert f"checkpoint_{2:06}" not in kept


def test_a_worker_that_was_replaced_writes_no_more(tmp_path: Path) -> None:
    driver, node = Driver(tmp_path / "r"), tmp_path / "node"
    node.mkdir()
    old, new = driver.new_writer(), driver.new_writer()
    (node / METRICS).write_text("old\n")
    with pytest.raises(RunFailed, match="another worker has taken over the run"):
        NodePublisher(old, node, Sent()).publish()
    (node / METRICS).write_text("new\n")
    NodePublisher(new, node, Sent()).publish()
    assert (tmp_path / "r" / METRICS).read_text() == "new\n"


def test_of_a_file_that_grew_only_that_is_sent(tmp_path: Path) -> None:
    node, there = tmp_path / "node", tmp_path / "r" / METRICS
    node.mkdir()
    calls: list[str] = []
    driver = Driver(tmp_path / "r")
    place = driver.new_writer()

    def noted(method: str, *arguments: object) -> object:
        calls.append(method)
        return driver(method, *arguments)

    publisher = NodePublisher(FolderAtDriver(noted, place.writer, ""), node, Sent())
    for content, by in (("a\n", "put"), ("a\nb\n", "append"), ("b\n", "put"), ("b\nc\n", "append")):
        calls.clear()
        (node / METRICS).write_text(content)
        publisher.publish()
        assert (there.read_text(), calls) == (content, [by])
    calls.clear()
    publisher.publish()
    assert calls == []


def test_a_file_of_several_blocks_arrives_whole(tmp_path: Path) -> None:
    place, source = Driver(tmp_path / "r").new_writer(), tmp_path / "large"
    for size in (0, BLOCK_BYTES, 2 * BLOCK_BYTES + 1):
        source.write_bytes(bytes([7]) * size)
        place.upload(source, "one")
        place.write("two", source.read_bytes())
        place.download("two", tmp_path / "three")
        for path in (tmp_path / "r/one", tmp_path / "r/two", tmp_path / "three"):
            assert path.read_bytes() == source.read_bytes()
    assert [path.name for path in (tmp_path / "r").iterdir() if path.name[0] == "."] == []


def test_a_checkpoint_is_a_draft_until_its_manifest_comes(tmp_path: Path) -> None:
    driver = Driver(tmp_path / "r")
    checkpoint = driver.new_writer() / "checkpoint_000002"
    checkpoint.write("model/config.json", b"{}")
    assert driver("files", "") == {} and checkpoint.read(MANIFEST) is None
    checkpoint.write(MANIFEST, b"{}")
    assert {*checkpoint.files(deep=True)} == {"model/config.json", MANIFEST}
    other = driver.new_writer() / "checkpoint_000004"  # a draft of one that was lost goes
    other.write("model/config.json", b"{}")
    driver.new_writer()
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["checkpoint_000002"]


def test_the_newest_checkpoint_is_also_one_of_a_worker_on_the_drivers_node(
    config: Config, tmp_path: Path
) -> None:
    driver = Driver(tmp_path / "r")
    assert driver("newest", "") is None
    with pytest.raises(Killed):
        train(config, driver, tmp_path / "node", lost_at=4)
    assert driver("newest", "") == "checkpoint_000004"
    local_job(config)
    shutil.copytree(tmp_path / "storage/r/checkpoint_000006", tmp_path / "r/checkpoint_000006")
    assert driver("newest", "") == "checkpoint_000006"


def test_a_call_that_is_made_twice_changes_nothing(tmp_path: Path) -> None:
    driver = Driver(tmp_path / "r")

    def twice(method: str, *arguments: object) -> object:
        driver(method, *arguments)
        return driver(method, *arguments)

    place = FolderAtDriver(twice, driver.new_writer().writer, "")
    large = bytes([7]) * (BLOCK_BYTES + 1)
    checkpoint = place / "checkpoint_000002"
    for name, content in (("model/large", large), (MANIFEST, b"{}")):
        checkpoint.write(name, content)
    assert {*checkpoint.files(deep=True)} == {"model/large", MANIFEST}
    assert (tmp_path / "r/checkpoint_000002/model/large").read_bytes() == large
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["checkpoint_000002"]


def published(source: Path) -> tuple[Config, Path]:
    """A config whose text is prepared and in the store, and where its tokens are here."""
    config = config_at(source)
    prepare(config)
    data_dir = make_request(config).data_dir
    publish_data(config, data_dir)
    return config, data_dir


def test_tokens_are_fetched_once_by_a_node_and_again_where_they_are_damaged(
    store: ObjectStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, data_dir = published(source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other node"))
    there = tokens_here(HOME, data_dir.name)
    assert there != data_dir and TokenData.open(there).fingerprint
    store.calls.clear()
    assert tokens_here(HOME, data_dir.name) == there and not store.calls
    (there / MANIFEST).write_text("{")
    assert TokenData.open(tokens_here(HOME, data_dir.name)).fingerprint
    shutil.rmtree(there)
    assert TokenData.open(tokens_here(HOME, data_dir.name)).fingerprint


def test_an_evaluation_has_its_tokens_on_a_node_that_had_none(
    store: ObjectStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data_dir = published(source)
    tokens = TokenData.open(data_dir).train.slice(0, 100)
    wanted = [ngram_hashes(tokens, length) for length in LENGTHS]
    task = EvaluationTask(config, [], data_dir, also={}, block_size=32, threads=1)
    here = result_of(Scorer(task).answer(Call("find", (0, 100, wanted), 0)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other node"))
    shutil.rmtree(data_dir)
    there = result_of(Scorer(task).answer(Call("find", (0, 100, wanted), 0)))
    assert [one.tolist() for one in there] == [one.tolist() for one in here]
    assert all(one.all() for one in there)
