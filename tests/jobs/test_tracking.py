"""Runs sent to trackers of experiments: every step once, whatever happens, and never an end."""

from __future__ import annotations

import collections
import importlib.util
import json
import logging
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gptray.config import RunFailed, TrackConfig, UserError
from gptray.jobs.progress.trackers import TrackedRun, check_trackers
from gptray.jobs.progress.tracking import Sent, new_points, tracking
from gptray.storage.record import MetricsRow
from tests.jobs.tracker import calls, exits

# What the trackers' packages warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

# Nobody listens there.
NOWHERE = "http://127.0.0.1:9"
BLOCK = 1 << 15


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def needs(package: str) -> None:
    pytest.importorskip(package)


def rows_of(steps: Sequence[int]) -> list[MetricsRow]:
    """A row for each step; every tenth was evaluated."""
    rows: list[MetricsRow] = [{"step": step, "train_loss": 9.0 - step / 10} for step in steps]
    for row in rows:
        if row["step"] % 10 == 0:
            row["val_loss"] = row["train_loss"] + 0.5
    return rows


def write(run: TrackedRun, steps: Sequence[int]) -> None:
    run.folder.mkdir(exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows_of(steps)]
    (run.folder / "metrics.jsonl").write_text("".join(lines))


def send(run: TrackedRun, steps: Sequence[int], **where: str) -> None:
    """What a job that trains to the last of these steps sends."""
    write(run, steps)
    with tracking(TrackConfig(**where), lambda: [run]):
        pass


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    return TrackedRun(tmp_path / "book", "book", {"optim.lr": 0.002, "data.split": [0.9, 0.1]})


def end(runs: Sequence[TrackedRun], error: BaseException | None, **where: str) -> None:
    """What a job sends that trains no further step and ends by an error."""
    with suppress(RunFailed, KeyboardInterrupt), tracking(TrackConfig(**where), lambda: [*runs]):
        if error:
            raise error


@pytest.mark.parametrize(
    ("error", "code"), [(None, 0), (RunFailed("lost"), 1), (KeyboardInterrupt(), 255)]
)
def test_a_tracker_is_told_how_a_run_ended_even_if_it_had_all_steps_before(
    run: TrackedRun, tmp_path: Path, wandb: Path, error: BaseException | None, code: int
) -> None:
    diverged = TrackedRun(tmp_path / "other", "other", {}, group="sweep", ending="failed")
    for one in (run, diverged):
        write(one, [5, 10])
    end([run, diverged], error, wandb="books")
    told = {"log": 2, "finish": 1}
    assert exits(wandb) == {"book": [code], "other": [1]}
    assert collections.Counter(call[0] for call in calls(wandb, "book")) == {"init": 1, **told}
    send(run, [5, 10], wandb="books")  # resumed after a kill, to do no more than end
    assert exits(wandb)["book"] == ([0] if code == 0 else [code, 0])
    send(run, [5, 10], wandb="books")
    assert exits(wandb)["book"][-1] == 0 and len(exits(wandb)["book"]) == 1 + (code != 0)


def test_only_what_is_new_is_sent_and_a_late_score_by_itself() -> None:
    rows = rows_of([5, 10, 15, 20])
    sent = Sent("somewhere", step=15, scored=-1)
    assert new_points(rows, Sent("somewhere"))[0] == (5, {"train_loss": 8.5})
    assert new_points(rows, sent) == [
        (10, {"val_loss": 8.5}),
        (20, {"train_loss": 7.0, "val_loss": 7.5}),
    ]
    assert new_points(rows, Sent("somewhere", step=20, scored=20)) == []


@pytest.mark.parametrize("package", ["mlflow", "wandb", "trackio"])
def test_a_missing_package_is_refused_with_what_to_install(package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    sentence = rf"^track.{package}=book needs the package {package}: pip install 'gptray\[{package}"
    with pytest.raises(UserError, match=sentence):
        check_trackers(TrackConfig(**{package: "book"}))
    check_trackers(TrackConfig())


def test_a_tracker_that_fails_is_told_once_and_ends_nothing(
    run: TrackedRun, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="gptray"):
        send(run, range(5, 25, 5), mlflow=NOWHERE)
    (told,) = [one.message for one in caplog.records if one.name == "gptray"]
    assert told.startswith(f"track.mlflow={NOWHERE} is not getting the run: ")
    assert told.endswith("; the job continues, and metrics.jsonl has every row")


def test_mlflow_has_every_step_once_after_kills(run: TrackedRun, tmp_path: Path) -> None:
    needs("mlflow")
    needs("sqlalchemy")
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    send(run, range(5, 25, 5), mlflow=uri)
    state = run.folder / "trackers.json"
    before = json.loads(state.read_text())
    send(run, range(5, 35, 5), mlflow=uri)
    before["mlflow"]["step"] = before["mlflow"]["scored"] = 10  # as a kill leaves it
    state.write_text(json.dumps(before))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("gptray")
    assert experiment
    for error, status in ((KeyboardInterrupt(), "KILLED"), (RunFailed("lost"), "FAILED")):
        end([run], error, mlflow=uri)
        (found,) = client.search_runs([experiment.experiment_id])
        assert found.info.status == status
    send(run, range(5, 45, 5), mlflow=uri)
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["optim.lr"] == "0.002"
    history = client.get_metric_history(found.info.run_id, "train_loss")
    assert sorted(one.step for one in history) == list(range(5, 45, 5))
    scores = client.get_metric_history(found.info.run_id, "val_loss")
    assert sorted(one.step for one in scores) == [10, 20, 30, 40]


def records(data: bytes) -> Iterator[bytes]:
    """What an offline run's file holds: LevelDB's log format after a head of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_wandb_has_every_step_once_in_one_run(run: TrackedRun) -> None:
    needs("wandb")
    import wandb
    from wandb.proto import wandb_internal_pb2

    send(run, range(5, 25, 5), wandb="book")
    # Two runs that begin in the same second would have the same folder.
    (run.folder / "wandb").rename(run.folder / "before")
    send(run, range(5, 35, 5), wandb="book")
    wandb.teardown()  # as at the end of the job: everything is on disk
    steps, runs = [], set()
    for path in sorted(run.folder.rglob("*.wandb")):
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            runs |= {record.run.run_id} - {""}
            for item in record.history.item:
                if "_step" in (item.key, *item.nested_key):
                    steps.append(json.loads(item.value_json))
    assert steps == list(range(5, 35, 5)) and len(runs) == 1


def test_trackio_has_every_step_once_in_one_run(run: TrackedRun, tmp_path: Path) -> None:
    os.environ["TRACKIO_DIR"] = str(tmp_path / "trackio")  # read when it is imported
    needs("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    other = TrackedRun(tmp_path / "other", "other", {}, group="sweep", ending="finished")
    write(other, [5])
    write(run, range(5, 25, 5))
    with tracking(TrackConfig(trackio="books"), lambda: [run, other]):  # as trials of a sweep
        pass
    send(run, range(5, 35, 5), trackio="books")
    logs: list[dict[str, Any]] = SQLiteStorage.get_logs("books", "book")
    assert [one["step"] for one in logs] == list(range(5, 35, 5))
    assert [one["step"] for one in SQLiteStorage.get_logs("books", "other")] == [5]
