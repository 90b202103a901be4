"""Storage that the nodes of a cluster do not share, on a cluster whose second node is apart."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptray.config import UserError
from gptray.jobs.cluster.shared_storage import Looks, Place, check_seen, problem_of
from tests.jobs.in_turn import LIMIT_S, Driver, driver
from tests.jobs.two_nodes import SECOND, may_unshare, two_nodes
from tests.object_store import ObjectStore
from tests.tiny import tiny_text

pytestmark = pytest.mark.xdist_group("nodes")
unlike = pytest.mark.skipif(not may_unshare(), reason="takes the right to unshare -m")


def looks(path: Path) -> tuple[Path, Looks]:
    return path, Looks(path.stat().st_size, path.read_bytes()[:64])


def test_a_node_that_sees_the_very_file_has_no_problem(tmp_path: Path) -> None:
    token = tmp_path / ".token"
    token.write_text("0123")
    assert problem_of([Place("storage_path=/x", tmp_path, "folder", True, (looks(token),))]) is None


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (None, "does not see this file; give a file that all nodes share, such as NFS"),
        ("other", "sees another file in place of this file; give a file that"),
        ("longer", "sees another file in place of this file; give a file that"),
    ],
)
def test_a_node_that_sees_no_file_or_another_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str | None, said: str
) -> None:
    monkeypatch.setattr("gptray.jobs.cluster.shared_storage.SETTLE_S", 0.0)
    book = tmp_path / "book.txt"
    book.write_text("abcde")
    place = Place(f"data.source={book}", book, "file", False, (looks(book),))
    book.unlink()
    if there:
        book.write_text(there)
    found = problem_of([place])
    assert found and found[0] == f"data.source={book}" and found[1].startswith(said)


def test_a_worker_that_sees_no_tokens_names_storage_path_and_its_node(tmp_path: Path) -> None:
    check_seen(tmp_path, storage_path="/x")
    with pytest.raises(UserError) as caught:
        check_seen(tmp_path / "data", storage_path="/x")
    assert "storage_path=/x: node " in str(caught.value)
    assert f" does not see {tmp_path / 'data'}; give a folder that all nodes" in str(caught.value)


def test_a_node_that_a_store_refuses_says_why(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "storage_path=s3://bucket/runs"
    assert problem_of([], [place]) is None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown")
    found = problem_of([], [place])
    assert found and found[0] == place and found[1].startswith("cannot be read: ")
    assert "credentials come from the environment" in found[1]


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in whose place the second node has one of its own."""
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "book.txt").write_text(tiny_text())
    return folder


@pytest.fixture(scope="module")
def jobs(hidden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """What runs jobs on the first node."""
    logs = tmp_path_factory.mktemp("logs")
    with two_nodes([hidden], logs) as environment, driver(environment) as running:
        yield running


@unlike
@pytest.mark.ray
@pytest.mark.timeout(2 * LIMIT_S)
@pytest.mark.parametrize(
    ("job", "place", "words"),
    [
        ("train", "storage_path={hidden}/runs", []),
        ("tune", "storage_path={hidden}/runs", ["tune.space=[{{path: optim.lr, choice: [1e-3]}}]"]),
        ("evaluate", "storage_path={hidden}/runs", ["evaluate.model={model}"]),
        (
            "generate",
            "generate.output_path={hidden}/out",
            ["generate.model={model}", "generate.input_path={prompts}"],
        ),
        ("serve", "serve.model={hidden}/model", []),
    ],
)
def test_a_job_refuses_a_folder_that_one_node_does_not_see(
    jobs: Driver, hidden: Path, model_dir: Path, job: str, place: str, words: list[str]
) -> None:
    prompts = model_dir / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    shutil.copytree(model_dir, hidden / "model", dirs_exist_ok=True)
    place, *words = (
        one.format(hidden=hidden, model=model_dir, prompts=prompts) for one in (place, *words)
    )
    done = jobs.run(job, place, *words, "name=a", "generate.backend=torch")
    assert done.returncode == 2, done.stderr
    assert (
        f"{job}: {place}: node {SECOND} does not see this folder; give a folder that all nodes "
        "share, such as NFS" in done.stderr.splitlines()
    )
    assert not (hidden / "runs").exists()


@unlike
@pytest.mark.ray
@pytest.mark.timeout(2 * LIMIT_S)
def test_preparing_refuses_a_text_that_one_node_does_not_see(
    jobs: Driver, hidden: Path, tmp_path: Path
) -> None:
    source = hidden / "book.txt"
    done = jobs.run("prepare", f"storage_path={tmp_path}", f"data.source={source}")
    assert done.returncode == 2, done.stderr
    assert f"data.source={source}: node {SECOND} does not see this file; give" in done.stderr


@unlike
@pytest.mark.ray
@pytest.mark.timeout(2 * LIMIT_S)
def test_the_doctor_names_unshared_storage_and_a_full_disk_on_the_second_node(
    jobs: Driver, hidden: Path
) -> None:
    done = jobs.run("doctor", f"storage_path={hidden}")
    assert done.returncode == 1, done.stderr
    line = json.loads(done.stdout)
    levels = {check["check"]: check["level"] for check in line["checks"]}
    messages = {check["check"]: check["message"] for check in line["checks"]}
    assert not line["ok"] and len(line["nodes"]) == 2
    assert (levels["storage"], levels["disk"]) == ("fail", "fail")
    assert f"storage_path={hidden}: node {SECOND} does not see this folder" in messages["storage"]
    assert f"for storage_path in {hidden} on {SECOND}" in messages["disk"]
    # The second node is this very machine.
    assert levels["clocks"] == levels["versions"] == levels["packages"] == "ok"
    assert levels["authentication"] == "warn" and levels["ports"] == "warn"
    assert re.match(r"doctor: \d problems: .*storage, disk", done.stderr.splitlines()[-1])
