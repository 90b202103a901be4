"""A run whose home is an object store: killed, and resumed on a machine that has nothing of it."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from gptray.config import Config, UserError, load_config
from gptray.data.request import make_request
from gptray.data.tokenizer import char_tokenizer
from gptray.data.tokens import TokenData
from gptray.entry_points import run as dry_run
from gptray.jobs.evaluate.check import check as check_evaluation
from gptray.jobs.folders.publisher import RunPublisher, Sent
from gptray.jobs.folders.remote_data import download_data, publish_data
from gptray.jobs.folders.remote_run import publishing
from gptray.jobs.folders.resuming import save_config
from gptray.jobs.folders.run_folder import outcome
from gptray.jobs.generate.checked import check_model
from gptray.jobs.runs.check import check as check_runs
from gptray.jobs.train.check import check
from gptray.storage.driver_lock import held
from gptray.storage.files import sha256_of
from gptray.storage.lease import leased
from gptray.storage.manifest import write_manifest
from gptray.storage.node_cache import hold, make_room, set_published, storage_folder
from gptray.storage.remote_folder import RemoteFolder
from gptray.training.loop import fit
from tests.data.prepared import prepared_here
from tests.jobs.interrupted import STEPS, config_in, dies, what_it_came_to
from tests.jobs.interrupted import job as local_job
from tests.object_store import Object, ObjectStore
from tests.tiny import tiny_config, tiny_text

HOME = "s3://bucket/runs"
FIRST = "checkpoint_000002"


def config_at(source: Path, *words: str) -> Config:
    """The run of `config_in`, at home in the store."""
    return tiny_config(
        source, Path(), f"storage_path={HOME}", "name=r", f"train.max_steps={STEPS}",
        "train.eval_interval=2", "train.log_interval=1", "compute.num_to_keep=3", *words,
    )  # fmt: skip


def job(config: Config, *, die_at: int | None = None) -> dict[str, object]:
    """Train or resume, as the job does; or have the process die once a checkpoint is published."""
    checked = check(config)
    folder, data_dir = checked.folder, checked.text.request.data_dir
    download_data(config, data_dir)
    publish_data(config, data_dir)
    with held(folder), publishing(checked.config, folder) as publish:
        save_config(checked.config, folder)

        def report(metrics: dict[str, object], checkpoint: Path | None) -> None:
            publish()
            if metrics["step"] != die_at:
                return
            deadline = time.monotonic() + 120
            while "manifest.json" not in RemoteFolder(f"{HOME}/r/{FIRST}").files():
                assert time.monotonic() < deadline
            os._exit(9)

        fit(
            checked.config, TokenData.open(data_dir), folder, report=report,
            sample=lambda model: [("p", "o")], device=torch.device("cpu"),
        )  # fmt: skip
    return outcome(checked.config)


def prepare(config: Config) -> None:
    """Have the text prepared on this machine."""
    words = tiny_text(300)
    folder = make_request(config).data_dir
    folder.mkdir(parents=True)
    prepared_here(folder, char_tokenizer(words), train=words[:8000], val=words[8000:])


@pytest.mark.slow
def test_a_run_resumes_on_another_machine_to_the_same_bits(
    store: ObjectStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_at(source)
    prepare(config)
    dies(
        "from tests.jobs.test_remote_run import config_at, job\n"
        f"job(config_at(Path({str(source)!r})), die_at=4)"
    )
    assert f"{FIRST}/manifest.json" in store.names("bucket/runs/r")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other machine"))
    result = job(config)
    assert (result["run_dir"], result["model_dir"]) == (f"{HOME}/r", f"{HOME}/r/model")
    storage = tmp_path / "storage"
    prepare(config_in(storage))
    local_job(config_in(storage))
    here = check(config).folder
    assert what_it_came_to(here) == what_it_came_to(storage / "r")

    names = store.names("bucket/runs/r")
    assert not [name for name in names if "lease" in name]
    assert {"config.yaml", "metrics.jsonl", "events.jsonl", "model/manifest.json"} <= {*names}
    wholes = [name.partition("/")[0] for name in names if re.match(r"check.*/manifest.json", name)]
    assert wholes == [f"checkpoint_{step:06}" for step in (2, 4, 6)]
    model = check_model(load_config(None, [f"storage_path={HOME}", "generate.model=r"]))
    assert (model.name, model.folder.parent.name) == (f"{HOME}/r", "fetched")
    weights = "model.safetensors"
    assert sha256_of(model.folder / weights) == sha256_of(storage / "r/model" / weights)


def test_what_only_this_machine_has_is_not_taken_for_the_run(
    store: ObjectStore, source: Path
) -> None:
    config = config_at(source)
    prepare(config)
    job(config)
    last = f"checkpoint_{STEPS:06}"
    for name in store.names("bucket/runs/r"):
        if name.startswith(last):
            del store.objects[f"bucket/runs/r/{name}"]
    checked = check(config)
    assert checked.state and checked.state.step == STEPS - 2
    assert not (checked.folder / last).exists()
    job(config)
    assert f"{last}/manifest.json" in store.names("bucket/runs/r")
    raised = config_at(source, f"train.max_steps={STEPS + 2}")
    (told,) = check(raised).changes
    assert told.startswith(f"train.max_steps raised from {STEPS} to {STEPS + 2}")


def test_a_file_that_goes_while_it_is_published_holds_up_no_later_one(
    store: ObjectStore, source: Path
) -> None:
    config = config_at(source)
    prepare(config)
    checked = check(config)
    folder = checked.folder
    with held(folder), publishing(checked.config, folder) as publish:
        (folder / "model").mkdir()
        (folder / "model/config.json").symlink_to("gone.json")
        for name in ("first.yaml", "second.yaml"):
            (folder / name).write_text("{}")
            publish()
            store.await_name(f"bucket/runs/r/{name}", timeout_s=20)
        (folder / "model/gone.json").write_text("{}")
    assert "model/config.json" in store.names("bucket/runs/r")


def test_rows_are_never_there_without_a_checkpoint_however_fast_they_are_pruned(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, keep = tmp_path / "r", store.keep
    moves = {"checkpoint_000002/a": (2, 4), "metrics.jsonl": (4, 6)}  # stored: pruned, made

    def made(step: int) -> None:
        place = folder / f"checkpoint_{step:06}"
        place.mkdir(parents=True)
        for name in ("a", "b"):
            (place / name).write_text(f"{step}")
        write_manifest(place)

    def keep_and_train(name: str, one: Object) -> None:
        keep(name, one)
        if move := moves.pop(name.removeprefix("bucket/runs/r/"), None):
            shutil.rmtree(folder / f"checkpoint_{move[0]:06}")
            made(move[1])

    def whole() -> list[str]:
        names = store.names("bucket/runs/r")
        return [name.partition("/")[0] for name in names if name.endswith("manifest.json")]

    monkeypatch.setattr(store, "keep", keep_and_train)
    made(2)
    (folder / "metrics.jsonl").write_text("{}\n")
    publisher = RunPublisher(RemoteFolder(f"{HOME}/r"), folder, Sent())
    publisher.publish()
    assert not moves and whole() == ["checkpoint_000004"]
    publisher.publish()
    assert whole() == ["checkpoint_000006"]
    assert not [
        name for name in store.names("bucket/runs/r") if "000002" in name or "000004" in name
    ]


@pytest.mark.usefixtures("short_leases")
def test_another_machine_is_kept_out_while_a_run_is_trained(
    store: ObjectStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_at(source)
    prepare(config)
    checked = check(config)
    with held(checked.folder), publishing(checked.config, checked.folder):
        with pytest.raises(UserError, match=f"another process is training the run {HOME}/r"):
            check(config)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other machine"))
        prepare(config)
        with pytest.raises(UserError, match=f"another job is training the run {HOME}/r"):
            job(config)


def test_runs_are_named_and_listed_there(
    store: ObjectStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, words = config_at(source), [f"storage_path={HOME}"]
    prepare(config)
    job(config)
    store.put(source, "bucket/runs/stray/tiny.txt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other machine"))
    stray, run = check_runs(load_config(None, words)).runs
    assert (stray.kind, stray.problem) == ("other", "not a run: it has no config.yaml")
    assert (run.kind, run.path, run.state, run.step) == ("run", f"{HOME}/r", "finished", STEPS)
    assert run.next.endswith(f"--config {HOME}/r/config.yaml train.max_steps={2 * STEPS}") or (
        f"generate.model={HOME}/r" in run.next
    )
    assert run.bytes == sum(
        len(one.content) for name, one in store.objects.items() if name.startswith("bucket/runs/r/")
    )
    for named in ([], ["name=r"], ["generate.model=r"]):
        assert check_model(load_config(None, [*words, *named])).name == f"{HOME}/r"
    for named in (["name=r"], ["evaluate.model=r"], [f"evaluate.model={HOME}/r/model"]):
        checked = check_evaluation(load_config(None, [*words, *named]))
        assert (str(checked.home), checked.model) == (f"{HOME}/r", f"{HOME}/r")
        assert (
            checked.is_own_text and checked.text.request.data_dir == make_request(config).data_dir
        )
    with pytest.raises(UserError, match="name=q: no such run in s3://bucket/runs"):
        check_evaluation(load_config(None, [*words, "name=q"]))
    assert dry_run("train", [f"--config={HOME}/r/config.yaml", "--dry-run"]) == 0
    assert dry_run("train", [f"--config={HOME}/q/config.yaml", "--dry-run"]) == 2


def test_the_cache_keeps_what_is_in_use_or_not_published(
    store: ObjectStore, tmp_path: Path
) -> None:
    storage, outputs = storage_folder(HOME), tmp_path / "cache/gptray/outputs"
    files = {
        "published": storage / "a" / "model", "unpublished": storage / "b" / "model",
        "used": storage / "c" / "model", "shards": storage / "data" / "t" / "val.bin",
        "part": outputs / "x" / ".gptray" / "part-00000.parquet", "rows": outputs / "y" / "rows",
        "copy": tmp_path / "cache/gptray/nodes/z/r/metrics.jsonl",
    }  # fmt: skip
    for path in files.values():
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(1000))
    for name in ("published", "used", "shards"):
        set_published(files[name].parent, True)
    hold(files["used"].parent)
    make_room(most=7000)
    assert all(path.exists() for path in files.values())
    make_room(most=0)
    assert [name for name, path in files.items() if path.exists()] == [
        "unpublished",
        "used",
        "part",
    ]


def test_a_run_without_a_model_or_with_another_name_is_told(store: ObjectStore) -> None:
    store.objects["bucket/runs/book/config.yaml"] = Object(b"")
    words = [f"storage_path={HOME}"]
    message = "generate.model=boook: no such run in s3://bucket/runs, .*; did you mean book"
    with pytest.raises(UserError, match=message):
        check_model(load_config(None, [*words, "generate.model=boook"]))
    for name, told in (
        ("BOOOK", r"did you mean book\?"), ("\ucc45", ".* lists all runs"), ("my run", ".*"),
    ):  # fmt: skip
        message = f"generate.model={name}: no such run in s3://bucket/runs.* here[^;]*; {told}$"
        with pytest.raises(UserError, match=message):
            check_model(load_config(None, [*words, f"generate.model={name}"]))
    message = f"{HOME}/book has no model yet; .* --config {HOME}/book/config.yaml resumes it"
    for named in ("name=book", "generate.model=book"):
        with pytest.raises(UserError, match=message):
            check_model(load_config(None, [*words, named]))
    lease = RemoteFolder(HOME) / "book" / ".gptray"
    with leased(lease, busy="-"), pytest.raises(UserError, match="it is training, and its best"):
        check_model(load_config(None, [*words, "name=book"]))
    with pytest.raises(UserError, match="generate.model is not set and .* has no run with a model"):
        check_model(load_config(None, words))
    store.objects["bucket/runs/\uac00/config.yaml"] = Object(b"")
    for name in ("\uac00", "\u1100\u1161"):  # composed, and in parts
        with pytest.raises(UserError, match=f"{HOME}/\uac00 has no model yet"):
            check_model(load_config(None, [*words, f"generate.model={name}"]))
