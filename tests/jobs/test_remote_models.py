"""Models and tokenizers that a URI names: fetched to the node, verified, shared, bounded."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptray.config import UserError, load_config
from gptray.data.sources import find_files
from gptray.data.tokenizer_files import tokenizer_path, tokenizer_template
from gptray.entry_points import run
from gptray.jobs.evaluate.evaluated_model import models_to_evaluate
from gptray.jobs.folders.run_folder import resolve
from gptray.jobs.generate.checked import check_model
from gptray.jobs.serve.check import user_config
from gptray.model.hf import load_pretrained
from gptray.storage.manifest import write_manifest
from gptray.storage.node_cache import fetched
from gptray.storage.remote_folder import RemoteFolder
from tests.jobs.generating import generate
from tests.object_store import Object, ObjectStore

BOOK = "s3://bucket/runs/book"
ANY = re.compile(".*")
WEIGHTS = "bucket/runs/book/model/model.safetensors"


@pytest.fixture(autouse=True)
def book(store: ObjectStore, model_dir: Path) -> None:
    store.put(model_dir, "bucket/runs/book/model")


def copies(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache/gptray/fetched").iterdir() if path.is_dir()]


def fetches(store: ObjectStore) -> int:
    return sum(call.startswith(f"GET /{WEIGHTS}") for call in store.calls)


@pytest.mark.parametrize("place", [BOOK, f"{BOOK}/model"])
def test_a_model_in_an_object_store_writes_what_its_folder_does(
    place: str, model_dir: Path
) -> None:
    words = ["sample.prompt=the cat", "sample.max_new_tokens=12", "generate.precision=fp32"]
    there, here = (
        generate(load_config(None, [f"generate.model={model}", *words]))
        for model in (place, model_dir)
    )
    assert there["outputs"] == here["outputs"]
    assert there["model"] == place


def test_every_key_of_a_model_takes_a_uri(model_dir: Path) -> None:
    words = [f"{job}.model={BOOK}" for job in ("evaluate", "serve")]
    config = load_config(None, [*words, f"model.init_from={BOOK}", "train.block_size=8"])
    weights = (model_dir / "model.safetensors").read_bytes()
    assert (models_to_evaluate(config)[0].folder / "model.safetensors").read_bytes() == weights
    assert user_config(config) == {"model": BOOK, "served_model_name": "book"}
    trained = resolve(config)
    assert trained.model.init_from == trained.data.tokenizer == BOOK
    assert trained.model.n_embd == load_pretrained(model_dir).config.n_embd


def test_every_key_of_a_model_takes_the_name_of_a_run_there() -> None:
    words = ["storage_path=s3://bucket/runs", "train.block_size=8"]
    named = [f"{key}=book" for key in ("serve.model", "evaluate.model", "model.init_from")]
    config = load_config(None, [*words, *named])
    assert user_config(config)["model"] == models_to_evaluate(config)[0].place == BOOK
    trained = resolve(config)
    assert trained.model.init_from == trained.data.tokenizer == BOOK


@pytest.mark.parametrize("below", ["", "/model", "/model/tokenizer.json"])
def test_a_tokenizer_takes_a_uri_and_fetches_no_weights(
    store: ObjectStore, model_dir: Path, below: str
) -> None:
    path = tokenizer_path(BOOK + below)
    assert path
    name = "tokenizer.json"
    assert (path / name).read_bytes() == (model_dir / name).read_bytes()
    assert fetches(store) == 0


def test_a_tokenizer_in_a_store_brings_its_chat_template(
    store: ObjectStore, model_dir: Path, tmp_path: Path
) -> None:
    assert tokenizer_template(BOOK) is None
    shutil.copytree(model_dir, tmp_path / "talker")
    (tmp_path / "talker" / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    store.put(tmp_path / "talker", "bucket/runs/talker/model")
    assert tokenizer_template("s3://bucket/runs/talker") == "{{ messages }}"


def test_a_wrong_name_is_told_with_the_nearest_one() -> None:
    message = "generate.model: s3://bucket/runs/bok: no such folder; did you mean " + BOOK
    with pytest.raises(UserError, match=re.escape(message)):
        check_model(load_config(None, ["generate.model=s3://bucket/runs/bok"]))
    with pytest.raises(UserError, match="serve.model: s3://bucket/runs: no config.json in it or"):
        user_config(load_config(None, ["serve.model=s3://bucket/runs"]))
    with pytest.raises(UserError, match="data.tokenizer=s3://other/x: no such folder$"):
        tokenizer_path("s3://other/x")


def test_a_copy_is_never_taken_for_a_store_that_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"generate.model={BOOK}", "sample.prompt=the cat"]
    assert run("generate", [*words, "--dry-run"]) == 0
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    capsys.readouterr()
    assert run("generate", [*words, "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert (
        told.startswith(f"generate: generate.model: {BOOK}: cannot be read: ")
        and told.count("\n") == 1
    )
    assert "ACCESS_DENIED" in told and "credentials come from the environment" in told


def test_files_that_are_not_those_of_the_manifest_are_refused(
    store: ObjectStore, model_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "m")
    write_manifest(folder)
    store.put(folder, "bucket/m")
    with (folder / "model.safetensors").open("rb+") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    store.put(folder / "model.safetensors", "bucket/m/model.safetensors")
    message = "model.safetensors does not have the sha256 in its manifest"
    with pytest.raises(UserError, match=f"s3://bucket/m: damaged or incomplete: {message}"):
        check_model(load_config(None, ["generate.model=s3://bucket/m"]))
    assert copies(tmp_path) == []


def test_a_changed_model_is_fetched_again(
    store: ObjectStore, model_dir: Path, tmp_path: Path
) -> None:
    config = load_config(None, [f"generate.model={BOOK}"])
    before = check_model(config).folder
    assert check_model(config).folder == before and fetches(store) == 1
    store.put(model_dir / "model.safetensors", WEIGHTS)
    assert check_model(config).folder != before and fetches(store) == 2


def test_processes_of_a_node_fetch_a_model_once_and_mend_a_damaged_copy(
    store: ObjectStore, tmp_path: Path
) -> None:
    store.slow_each, store.slow_s = 1, 0.2  # both are there before one is done
    code = f"from gptray.model.shape import model_folder; print(model_folder({BOOK!r}))"
    command = [sys.executable, "-c", code]

    def folders(number: int) -> set[str]:
        started = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(number)
        ]
        return {one.communicate(timeout=120)[0].strip() for one in started}

    first = folders(2)
    assert len(first) == 1 and fetches(store) == 1
    folder = Path(*first)
    (folder / "model.safetensors").write_bytes(b"")
    assert folders(1) == first and fetches(store) == 2
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    size = (folder / "model.safetensors").stat().st_size
    assert size == listed["model.safetensors"]["size"] > 0


def test_copies_take_no_more_than_their_share_and_those_in_use_stay(
    store: ObjectStore, tmp_path: Path
) -> None:
    places = []
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * 1000)
        store.put(tmp_path / name, f"bucket/{name}/{name}")
        places.append(RemoteFolder(f"s3://bucket/{name}"))
    code = (
        "import re\nfrom gptray.storage.node_cache import fetched\n"
        "from gptray.storage.remote_folder import *\n"
        "print(fetched(RemoteFolder('s3://bucket/a'), re.compile('.*')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unused = Path(done.stdout.strip())
    used = fetched(places[1], ANY, most=3000)
    assert unused.is_dir() and used.is_dir()
    last = fetched(places[2], ANY, most=1500)
    assert sorted(copies(tmp_path)) == sorted([used, last])


@pytest.mark.parametrize("fault", ["busy", "slow"])
def test_a_busy_or_slow_store_fails_nothing(store: ObjectStore, fault: str) -> None:
    setattr(store, f"{fault}_each", 4)
    store.slow_s = 0.2
    check_model(load_config(None, [f"generate.model={BOOK}"]))
    store.objects["bucket/in/p.jsonl"] = Object(b'{"text": "a"}\n' * 9)
    store.objects["bucket/in/q.txt.gz"] = Object(gzip.compress(b"b" * 9))
    files = find_files("s3://bucket/in")
    for _ in range(3):
        assert [file.open().read() for file in files] == [b'{"text": "a"}\n' * 9, b"b" * 9]
    assert not any(file.changed() for file in files)
