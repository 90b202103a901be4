"""Runs that land, as jobs see them: their plan, their outcome, and what may follow."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from gptray.config import Config, UserError, load_config
from gptray.jobs.folders.resuming import (
    check_not_landing,
    check_resumable,
    how_to_train_longer,
    is_finished,
    save_config,
)
from gptray.jobs.folders.run_folder import outcome, resolve, run_dir
from gptray.jobs.progress.tracking import Sent, new_points
from gptray.jobs.train.check import check, plan
from gptray.jobs.train.watch import watching
from gptray.storage.record import METRICS, MetricsRow, read_metrics, write_event
from gptray.training.landing import Landing
from gptray.training.stopping import EarlyStopping
from gptray.training.trainer_state import TrainerState

LANDING = Landing(start=60, back_to=40, steps=8, reason="patience")


def config_of(storage: Path, *keys: str) -> Config:
    words = (f"storage_path={storage}", "name=run", "optim.schedule=wsd", "train.max_steps=100")
    values = dict(word.split("=", 1) for word in (*words, *keys))
    return resolve(load_config(None, [f"{key}={value}" for key, value in values.items()]))


def row(step: int, val_loss: float | None, phase: str = "stable") -> dict[str, object]:
    made: dict[str, object] = {"step": step, "train_loss": 2.0, "tokens_per_sec": 9.0}
    scored = {"val_loss": val_loss, "val_ppl": 7.4, "val_bpb": 1.0}
    return made | {"phase": phase} | (scored if val_loss else {})


def made(config: Config, *rows: dict[str, object]) -> Path:
    folder = run_dir(config)
    folder.mkdir(parents=True)
    save_config(config, folder)
    (folder / METRICS).write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")
    return folder


def test_the_dry_run_says_when_a_run_lands_and_for_how_long(tmp_path: Path) -> None:
    config = load_config(
        None, [f"storage_path={tmp_path}", "optim.schedule=wsd", "train.max_steps=1000"]
    )
    rows = dict(plan(check(config)))
    assert rows["landing"] == (
        "after step 833, or when patience runs out: back to the best checkpoint and a cool-down of "
        "0.2 of its steps, 167 at most"
    )
    assert rows["tokens in all"] == f"{1000 * config.tokens_per_step:,} at most"


def test_the_outcome_has_the_landing_and_its_gain(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    folder = made(config, row(40, 2.0), row(60, 2.5), row(68, 1.75, "landing"))
    told = outcome(config)
    assert (told["step"], told["best_step"], told["val_loss"]) == (68, 68, 1.75)
    assert (told["stopped"], told["landed"], told["landing_gain"]) == ("patience", True, 0.25)
    (folder / METRICS).write_text(
        "".join(json.dumps(one) + "\n" for one in (row(83, 2.0), row(100, 2.25, "landing")))
    )
    told = outcome(config)
    assert (told["best_step"], told["stopped"]) == (83, "max_steps")
    assert (told["landed"], told["landing_gain"]) == (False, -0.25)


def test_a_run_of_another_schedule_has_not_landed(tmp_path: Path) -> None:
    config = config_of(tmp_path, "optim.schedule=cosine")
    made(config, row(100, 2.0))
    told = outcome(config)
    assert (told["stopped"], told["landed"], told["landing_gain"]) == ("max_steps", False, None)


def test_a_run_is_finished_once_it_has_landed(tmp_path: Path) -> None:
    config = config_of(tmp_path, "train.patience=2")
    out_of_patience = TrainerState(60, EarlyStopping(bad_evals=2), "d")
    assert not is_finished(config, tmp_path, out_of_patience)
    assert not is_finished(
        config, tmp_path, TrainerState(67, EarlyStopping(), "d", landing=LANDING)
    )
    over = TrainerState(68, EarlyStopping(), "d", landing=LANDING)
    assert is_finished(config, tmp_path, over)
    assert "has landed and is finished" in how_to_train_longer(config, tmp_path, over)


def test_a_landing_run_cannot_be_trained_longer(tmp_path: Path) -> None:
    folder = made(config_of(tmp_path), row(60, 2.0))
    (folder / "checkpoint_000060").mkdir()
    longer = config_of(tmp_path, "train.max_steps=200")
    changes = check_resumable(longer)
    check_not_landing(longer, changes, TrainerState(60, EarlyStopping(), "d"))
    with pytest.raises(
        UserError, match="raised from 100 to 200: .* has begun to land after step 60"
    ):
        check_not_landing(longer, changes, TrainerState(64, EarlyStopping(), "d", landing=LANDING))
    check_not_landing(longer, [], TrainerState(64, EarlyStopping(), "d", landing=LANDING))


def test_fewer_steps_than_a_landing_needs_are_refused(tmp_path: Path) -> None:
    folder = made(config_of(tmp_path), row(60, 2.0))
    (folder / "checkpoint_000060").mkdir()
    assert check_resumable(config_of(tmp_path, "train.max_steps=72"))
    with pytest.raises(UserError, match="60 steps, and its cool-down takes up to 12 more; give 72"):
        check_resumable(config_of(tmp_path, "train.max_steps=71"))


def test_the_terminal_tells_of_the_landing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gptray")
    config = config_of(tmp_path)
    folder = made(config, row(60, 2.0))
    with watching(folder, 100, on_evaluation=lambda: None):
        write_event(folder, "start", step=60, workers=1, parameters=9, dtype="float32")
        write_event(folder, "landing", step=60, back_to=40, until=68, message="landing: back to 40")
        with (folder / METRICS).open("a") as file:
            file.write(json.dumps(row(68, 1.75, "landing")) + "\n")
    assert "landing: back to 40" in caplog.messages
    assert any(one.startswith("step 68/68  landing  train 2.000") for one in caplog.messages)


def test_the_terminal_tells_that_kernels_are_built(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gptray")
    folder = made(config_of(tmp_path), row(1, 2.0))
    with watching(folder, 100, on_evaluation=lambda: None):
        write_event(folder, "building", message="building the C++ kernels")
    assert caplog.messages == ["building the C++ kernels"]


def test_trackers_get_numbers_only(tmp_path: Path) -> None:
    folder = made(config_of(tmp_path), row(68, 1.75, "landing"))
    rows: list[MetricsRow] = read_metrics(folder)
    [(step, values)] = new_points(rows, Sent("here"))
    assert step == 68 and all(isinstance(value, float) for value in values.values())
