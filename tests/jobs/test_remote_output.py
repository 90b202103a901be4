"""A batch job whose output lies in an object store: rows once, whole files, one writer."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from pyarrow import fs, parquet

from gptray import system
from gptray.config import Config, RunFailed, UserError, dump
from gptray.data.parts import part_name
from gptray.jobs.cluster.tasks import result_of
from gptray.jobs.generate.checked import check_batch
from gptray.jobs.generate.output import Output
from gptray.jobs.generate.remote_output import output_kind
from gptray.jobs.generate.worker import EngineWorker, GenerateTask
from gptray.storage.lease import leased
from gptray.storage.remote_folder import RemoteFolder
from tests.jobs.generating import config_of, planned
from tests.object_store import Object, ObjectStore
from tests.processes import before_long

ROOT = Path(__file__).parents[2]
OUT, ROWS = "s3://bucket/out", 25
PARTS = [part_name(number) for number in range(4)]
LEASE = "lease-other.json"
DICTIONARY = pa.dictionary(pa.int8(), pa.string())
Feed = Callable[[Output, int], None]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [json.dumps({"id": number, "prompt": f"the cat {number}"}) for number in range(ROWS)]
    path = tmp_path_factory.mktemp("prompts") / "in.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def config(model_dir: Path, prompts: Path, store: ObjectStore) -> Config:
    store.put(prompts, "bucket/prompts/in.jsonl")
    return config_at(model_dir, prompts)


def config_at(model_dir: Path, prompts: Path, output: str = OUT) -> Config:
    words = ["sample.max_new_tokens=2", "generate.backend=torch", f"generate.output_path={output}"]
    return config_of(model_dir, prompts, Path(), *words)


@pytest.fixture
def feed(config: Config, model_dir: Path) -> Feed:
    """Has one part of an output written and published, as an engine's process does."""

    def feed(output: Output, number: int) -> None:
        task = GenerateTask(
            config, threads=1, model=str(model_dir), model_name="m", output=OUT,
            metadata=output.metadata(),
        )  # fmt: skip
        engine = EngineWorker(task)
        assert result_of(engine.feed(number, output.handed(number))) == []
        assert result_of(engine.finish()) == [number]

    return feed


def job(config: Config, feed: Feed, *, most: int | None = None) -> dict[str, Any] | None:
    """Start or resume a job; None if it was ended after `most` parts."""
    checked = check_batch(config)
    with output_kind(checked).opened(checked) as output:
        missing = output.missing_parts()
        for number in missing[:most]:
            feed(output, number)
        return output.finish() if most is None else None


def ids(store: ObjectStore) -> list[int]:
    filesystem, path = fs.FileSystem.from_uri(OUT)
    found: list[int] = parquet.read_table(path, filesystem=filesystem)["id"].to_pylist()
    return found


def test_rows_are_there_once_and_the_sign_of_success_comes_last(
    store: ObjectStore, config: Config, feed: Feed, tmp_path: Path
) -> None:
    assert job(config, feed, most=2) is None
    assert store.names("bucket/out") == [".gptray/plan.json", *PARTS[:2]]
    shutil.rmtree(tmp_path / "cache")  # another machine
    summary = job(config, feed)
    assert summary and (summary["rows"], summary["output_path"]) == (ROWS, OUT)
    assert ids(store) == list(range(ROWS))
    names = [".gptray/plan.json", "_SUCCESS", "_manifest.json", *PARTS]
    assert store.names("bucket/out") == sorted(names)
    manifest = json.loads(store.objects["bucket/out/_manifest.json"].content)
    assert [file["rows"] for file in manifest["files"].values()] == [8, 8, 8, 1]
    uploads = [call.split("?")[0] for call in store.calls if call.startswith(("PUT", "POST"))]
    assert uploads[-1].endswith(("out/_SUCCESS", "out/.gptray/"))  # and a folder's marker
    assert not list(tmp_path.glob("cache/gptray/outputs/*/.gptray/part-*"))


def test_a_finished_output_is_left_alone_but_for_a_part_that_is_gone(
    store: ObjectStore, config: Config, feed: Feed
) -> None:
    job(config, feed)
    before = {name: store.objects[f"bucket/out/{name}"] for name in PARTS}
    job(config, feed)
    gone = store.objects.pop(f"bucket/out/{PARTS[1]}")
    job(config, feed)
    after = {name: store.objects[f"bucket/out/{name}"] for name in PARTS}
    assert after[PARTS[1]].content == gone.content
    assert {**after, PARTS[1]: gone} == before


def test_what_others_wrote_is_never_taken_for_the_jobs(
    store: ObjectStore, config: Config, feed: Feed, model_dir: Path, prompts: Path
) -> None:
    with pytest.raises(UserError, match="s3://bucket/prompts exists and was not written by this"):
        job(config_at(model_dir, prompts, "s3://bucket/prompts"), feed)
    job(config, feed, most=1)
    store.objects["bucket/out/part-00009.parquet"] = Object(b"x")
    with pytest.raises(UserError, match=r"out/part-00009\.parquet was not written by this job"):
        job(config, feed)
    del store.objects["bucket/out/part-00009.parquet"]
    store.objects[f"bucket/out/{PARTS[3]}"] = Object(b"x")
    with pytest.raises(RunFailed, match=rf"{OUT}/{PARTS[3]} is damaged: .*; delete it and run"):
        job(config, feed)
    del store.objects[f"bucket/out/{PARTS[3]}"]
    other = config.model_copy(
        update={"sample": config.sample.model_copy(update={"max_new_tokens": 3})}
    )
    with pytest.raises(UserError, match=f"{OUT} was started with .*\n.*max_new_tokens: 2 there, 3"):
        job(other, feed)
    store.objects["bucket/out/.gptray/plan.json"] = Object(b"{}")
    with pytest.raises(UserError, match=r"out/.gptray/plan\.json is damaged or was not written by"):
        planned(config)


def test_a_job_that_is_refused_while_its_input_is_cut_leaves_nothing(
    store: ObjectStore, model_dir: Path, tmp_path: Path, feed: Feed
) -> None:
    for first in (0, 100):  # together more values than the type can number
        kinds = pa.array([f"kind {first + number}" for number in range(100)])
        table = pa.table({"prompt": ["x"] * 100, "kind": kinds.cast(DICTIONARY)})
        parquet.write_table(table, tmp_path / f"{first}.parquet")
    config = config_at(model_dir, tmp_path / "*.parquet")
    whole = config.generate.model_copy(update={"rows_per_file": 200})
    with pytest.raises(UserError, match="column 'kind' has more values"):
        job(config.model_copy(update={"generate": whole}), feed)
    assert store.names("bucket/out") == []


def test_an_output_among_the_input_is_refused(
    store: ObjectStore, model_dir: Path, prompts: Path
) -> None:
    store.put(prompts, "bucket/in/p.jsonl")
    for given in ("s3://bucket/in", "s3://bucket/**/*.*"):
        with pytest.raises(UserError, match=r"s3://bucket/in/out is inside generate\.input_path"):
            check_batch(
                config_at(model_dir, prompts, "s3://bucket/in/out").model_copy(
                    update={"generate": _generate(model_dir, prompts, given)}
                )
            )
    with pytest.raises(UserError, match=r"hdfs:// is read-only; give a folder, or one of s3"):
        check_batch(config_at(model_dir, prompts, "hdfs://name/out"))


def _generate(model_dir: Path, prompts: Path, given: str) -> Any:
    config = config_at(model_dir, prompts, "s3://bucket/in/out")
    return config.generate.model_copy(update={"input_path": given})


def test_a_lease_that_is_kept_refuses_and_one_that_was_left_is_removed(
    store: ObjectStore, config: Config, feed: Feed
) -> None:
    place = RemoteFolder(OUT) / ".gptray"
    with (
        leased(place, busy="busy", expires_s=6) as lease,  # renewed, so seen, after 1.5 s
        pytest.raises(
            UserError, match=f"another job is writing to {OUT} now .process {os.getpid()}"
        ),
    ):
        lease.check()
        job(config, feed)
    assert store.names("bucket/out") == []
    code = (
        "import os\nfrom gptray.storage.lease import leased\n"
        "from gptray.storage.remote_folder import RemoteFolder\n"
        f"with leased(RemoteFolder({place.uri!r}), busy='busy'): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    (left,) = store.names("bucket/out")
    assert re.fullmatch(r"\.gptray/lease-\w+\.json", left)
    job(config, feed)  # at once, since the process was of this machine
    assert not [name for name in store.names("bucket/out") if "lease" in name]


def test_a_lease_of_another_machine_is_waited_out(
    store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    place = RemoteFolder("s3://bucket/out/.gptray")
    owner = {"host": "node7", "machine": "x", "pid": 12}
    store.objects[f"bucket/out/.gptray/{LEASE}"] = Object(json.dumps(owner).encode())
    caplog.set_level("INFO")
    with leased(place, busy="busy", expires_s=1.5):
        (own,) = place.files()
    assert own != LEASE and "whether process 12 on node7 is still running" in caplog.text


def test_on_macos_a_lease_is_known_by_boot_and_process(
    store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sysctl = tmp_path / "sysctl"
    sysctl.write_text('#!/bin/sh\n[ "$2" = kern.bootsessionuuid ] && echo this-boot\n')
    sysctl.chmod(0o755)
    monkeypatch.setattr(system, "SYSCTL", sysctl)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    caplog.set_level("INFO")
    place = RemoteFolder("s3://bucket/out/.gptray")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        began = psutil.Process(process.pid).create_time()
        owner = {"host": "mac", "machine": "this-boot", "pid": process.pid, "began": began}
        left = Object(json.dumps(owner).encode())
        for is_over in (False, True):
            store.objects[f"bucket/out/.gptray/{LEASE}"] = left
            caplog.clear()
            with leased(place, busy="busy", expires_s=1.5):
                (own,) = place.files()
            waited = f"whether process {process.pid} on mac is still running" in caplog.text
            assert own != LEASE and waited != is_over
            if not is_over:
                process.communicate(b"\n", timeout=60)


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_lease_that_ran_out_while_the_machine_slept_is_lost_if_another_removed_it(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    def may_write() -> bool:
        with suppress(RunFailed):
            lease.check()
            return True
        return False

    place, clock_gettime = RemoteFolder("s3://bucket/out/.gptray"), time.clock_gettime
    with leased(place, busy="busy", expires_s=2) as lease:
        keeper = next(one for one in threading.enumerate() if one.name == "lease")
        (name,) = place.files()
        if is_removed:
            place.remove(name)
        monkeypatch.setattr(time, "clock_gettime", lambda clock: clock_gettime(clock) + 100)
        assert not may_write()
        before_long(lambda: not keeper.is_alive() or may_write())
        assert may_write() != is_removed and bool(place.files()) != is_removed


def test_a_busy_store_and_a_store_that_refuses(
    store: ObjectStore, config: Config, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.busy_each = 6
    job(config, feed, most=1)
    summary = job(config, feed)
    store.busy_each = 0
    assert summary and summary["rows"] == ROWS and ids(store) == list(range(ROWS))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    with pytest.raises(UserError, match="generate.output_path: s3://bucket/out.*: cannot be read"):
        job(config, feed)


@pytest.mark.ray
def test_a_killed_job_goes_on_with_the_same_command(
    store: ObjectStore, config: Config, tmp_path: Path, model_dir: Path
) -> None:
    store.put(model_dir, "bucket/m/model")
    words = {"model": "s3://bucket/m", "input_path": "s3://bucket/prompts/*.jsonl"}
    config = config.model_copy(update={"generate": config.generate.model_copy(update=words)})
    (tmp_path / "config.yaml").write_text(dump(config))
    job = [sys.executable, str(ROOT / "jobs/generate.py"), "--config", f"{tmp_path}/config.yaml"]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(job, stdout=log, stderr=log) as one:
        store.await_name("bucket/out/part-", timeout_s=300)
        one.kill()
    assert "_SUCCESS" not in store.names("bucket/out")
    done = subprocess.run(job, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == ROWS
    assert ids(store) == list(range(ROWS))
    names = store.names("bucket/out")
    assert "_SUCCESS" in names and not [name for name in names if "lease" in name]
