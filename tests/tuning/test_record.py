"""A sweep's record: read as it was written, also after a kill in the middle of a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptray.config import Config, RunFailed, dump, override
from gptray.storage.record import METRICS
from gptray.tuning.sweep_record import TRIALS, Record, load_sweep, rungs, trial_dir
from tests.full_disk import files_up_to


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(dump(Config()))
    return tmp_path


def write_rows(folder: Path, trial: str, *scores: float) -> None:
    run = trial_dir(folder, trial)
    run.mkdir(parents=True)
    rows = [
        {"step": 10 * n, "train_loss": 1.0, "val_bpb": score}
        for n, score in enumerate(scores, start=1)
    ]
    rows.append({"step": 10 * len(rows) + 5, "train_loss": 1.0})
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_sweep_is_read_as_it_was_written(folder: Path) -> None:
    record = Record(folder)
    record.write("planned", trial="0000", values={}, max_steps=40)
    record.write(
        "planned", trial="0001", values={"optim.lr": 0.5, "data.split": [0.9, 0.1]}, max_steps=40
    )
    record.write("started", trial="0000")
    record.write("ended", trial="0000", outcome="stopped", step=35)
    record.write("planned", trial="0002", values={"seed": 7}, max_steps=40, replicate_of="0000")
    record.write("started", trial="0001")
    record.write("winner", trial="0000")
    write_rows(folder, "0000", 2.5, 2.0, 2.25)
    sweep = load_sweep(folder)
    first, second, third = sweep.trials
    assert (first.outcome, first.step, first.started) == ("stopped", 35, True)
    assert first.best == {"step": 20, "train_loss": 1.0, "val_bpb": 2.0}
    assert (second.outcome, second.step, second.started, second.best) == (None, 0, True, None)
    assert second.values == {"optim.lr": 0.5, "data.split": [0.9, 0.1]}
    assert (third.replicate_of, third.started) == ("0000", False)
    assert sweep.winner == "0000"
    assert sweep.config == Config()


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_cut_off_is_no_event_and_is_written_over(folder: Path, cut: int) -> None:
    record = Record(folder)
    record.write("planned", trial="0000", values={}, max_steps=40)
    record.write("ended", trial="0000", outcome="finished", step=40)
    path = folder / TRIALS
    path.write_bytes(path.read_bytes()[:-cut])
    assert [trial.outcome for trial in load_sweep(folder).trials] == [None]
    record = Record(folder)
    record.write("ended", trial="0000", outcome="diverged", step=7, message="loss nan")
    (trial,) = load_sweep(folder).trials
    assert (trial.outcome, trial.step, trial.message) == ("diverged", 7, "loss nan")


def test_a_trial_that_is_retried_waits_again(folder: Path) -> None:
    record = Record(folder)
    record.write("planned", trial="0000", values={}, max_steps=40)
    record.write("started", trial="0000")
    record.write(
        "ended", trial="0000", outcome="failed", step=10, message="cannot write", passing=True
    )
    (trial,) = load_sweep(folder).trials
    assert (trial.outcome, trial.passing) == ("failed", True)
    record.write("retried", trial="0000")
    (trial,) = load_sweep(folder).trials
    assert (trial.outcome, trial.passing, trial.started) == (None, False, True)
    record.write("ended", trial="0000", outcome="finished", step=40)
    (trial,) = load_sweep(folder).trials
    assert (trial.outcome, trial.step) == ("finished", 40)


def test_a_trial_that_is_promoted_goes_on(folder: Path) -> None:
    record = Record(folder)
    record.write("planned", trial="0000", values={}, max_steps=40)
    record.write("started", trial="0000")
    record.write("ended", trial="0000", outcome="stopped", step=10)
    record.write("promoted", trial="0000")
    (trial,) = load_sweep(folder).trials
    assert (trial.outcome, trial.state) == (None, "running")
    record.write("ended", trial="0000", outcome="finished", step=40)
    assert [one.outcome for one in load_sweep(folder).trials] == ["finished"]


def test_a_record_without_room_says_so_and_keeps_whole_lines(folder: Path) -> None:
    record = Record(folder)
    record.write("planned", trial="0000", values={}, max_steps=40)
    path = folder / TRIALS
    with (
        files_up_to(path.stat().st_size + 20),
        pytest.raises(RunFailed, match=f"cannot write {path}"),
    ):
        record.write("started", trial="0000")
    record.write("winner", trial="0000")
    assert load_sweep(folder).winner == "0000" and not load_sweep(folder).trials[0].started


def test_rungs_rise_by_the_factor_and_stay_below_the_end() -> None:
    keys = {"train.max_steps": 360, "train.eval_interval": 20, "tune.grace_period": 2}
    assert rungs(override(Config(), keys)) == [40, 120]
    assert rungs(override(Config(), {**keys, "tune.reduction_factor": 2})) == [40, 80, 160, 320]
    assert rungs(override(Config(), {**keys, "tune.grace_period": 18})) == []
    landing = {**keys, "optim.schedule": "wsd", "tune.grace_period": 5}  # from step 300 on
    assert rungs(override(Config(), landing)) == [100, 300]
    assert rungs(override(Config(), {**landing, "tune.grace_period": 16})) == []
