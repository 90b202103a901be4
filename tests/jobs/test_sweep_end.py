"""What a finished sweep says of its winner: what it has seen, and the command that goes further."""

from __future__ import annotations

import html
import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gptray.config import dump, load_config, override
from gptray.jobs.tune.end import outcome, tell_winner
from gptray.reports.sweep.report import write_sweep_report
from gptray.storage.record import EVENTS, METRICS
from gptray.tuning.sweep_record import Record, load_sweep
from tests.reports.pages import Page
from tests.tuning.sweeps import sweep_config, trained, write_sweep


def swept(folder: Path, *overrides: str, space: Sequence[dict[str, Any]] = ()) -> Path:
    """A sweep of five trials whose first has won: twelve evaluations, a tenth of an epoch each."""
    dropout = {"path": "model.dropout", "uniform": [0.0, 0.3]}
    config = sweep_config([*space, dropout], "tune.num_samples=5", *overrides)
    trials = trained(config, lambda values: (values["model.dropout"], 0.0))
    best = min(trials, key=lambda one: min(one.curve))
    write_sweep(folder, config, trials, winner=best.name)
    values = {**best.values, "storage_path": str(folder.parent), "compute.cpus_per_worker": 1}
    (folder / "best.yaml").write_text(dump(override(config, values)))
    return folder


def test_json_and_headline_say_what_the_winner_has_seen(tmp_path: Path) -> None:
    part = {"path": "data.fraction", "choice": [0.05]}
    folder = swept(tmp_path / "part", "train.patience=null", space=[part])
    line: dict[str, Any] = outcome(load_sweep(folder), str(folder))
    step = line["best_step"]
    assert line["best_tokens"] == step * 16 * 128
    assert line["best_epochs"] == pytest.approx(step / 100)
    assert line["best_text_share"] == pytest.approx(0.05 * min(1, step / 100))
    page = Page(write_sweep_report(folder))
    assert "% of the training text (data.fraction)" in page.text
    assert f"in {step} steps ({step * 2048:,} tokens)." in page.text


def test_line_report_and_terminal_say_why_a_sweep_stopped_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gptray")
    folder = swept(tmp_path / "stopped")
    line: dict[str, Any] = outcome(load_sweep(folder), str(folder))
    assert line["stopped_early"] is None and line["trials"] == 5
    record = Record(folder)
    for name in ("0005", "0006"):
        record.write("planned", trial=name, values={"model.dropout": 0.1}, max_steps=120)
        record.write("ended", trial=name, outcome="skipped", step=0)
    why = {"trials": 5, "of": 7, "gain": 0.0041, "gain_at_most": 0.0093, "min_gain": 0.01}
    record.write("enough", trials=5, of=7, gain=0.0041, gain_at_most=0.0093, min_gain=0.01)
    sweep = load_sweep(folder)
    line = outcome(sweep, str(folder))
    assert line["stopped_early"] == why and line["trials"] == 5
    words = "Stopped after 5 of 7 trials: 10 more would improve the best by 0.0041 bits per byte"
    tell_winner(sweep, str(folder))
    assert any(message.startswith(words) for message in caplog.messages)
    assert words in Page(write_sweep_report(folder)).text


def test_what_trials_forget_is_in_line_report_and_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gptray")
    folder = swept(tmp_path / "forgets")
    for number, trial in enumerate(sorted((folder / "trials").iterdir())):
        rows = [json.loads(row) for row in (trial / METRICS).read_text().splitlines()]
        scored = [{**row, "also": {"old": {"loss": 2.0, "bpb": 2.5 + number}}} for row in rows]
        (trial / METRICS).write_text("".join(f"{json.dumps(row)}\n" for row in scored))
        base = {"event": "base", "time": 1.0, "val_loss": 9.0, "val_bpb": 8.0}
        base["also"] = {"old": {"loss": 2.0, "bpb": 3.0}}
        (trial / EVENTS).write_text(f"{json.dumps(base)}\n")
    sweep = load_sweep(folder)
    line: dict[str, Any] = outcome(sweep, str(folder))
    after = 2.5 + int(line["best_trial"])
    assert line["also"] == {"old": {"base_bpb": 3.0, "bpb": after}}
    tell_winner(sweep, str(folder))
    assert any(f"; on old 3.00 -> {after:.2f}" in message for message in caplog.messages)
    page = Page(write_sweep_report(folder))
    assert "on old 3.00 -> 2.50" in page.text and "on old 3.00 -> 5.50: it forgot" in page.text


@pytest.mark.parametrize("fraction", [0.05, 1.0])
def test_the_printed_command_trains_the_winner_longer_on_all_of_the_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fraction: float
) -> None:
    caplog.set_level(logging.INFO, "gptray")
    part = {"path": "data.fraction", "choice": [fraction]}
    folder = swept(tmp_path / "my 'sweep'", "train.patience=null", space=[part])
    tell_winner(load_sweep(folder), str(folder))
    winner, settings, following = caplog.messages
    assert "bits per byte; it has seen" in winner and "model.dropout=" in settings
    longer, written = following.splitlines()[1:]
    _, script, flag, path, *words = shlex.split(longer)
    assert (script, flag) == ("jobs/train.py", "--config")
    config = load_config(path, [word for word in words if not word.startswith("name=")])
    best = load_config(path, [])
    assert (config.train.max_steps, config.train.patience) == (480, 5)
    assert config.data.fraction == 1 and config.model.dropout == best.model.dropout
    assert (best.compute.cpus_per_worker, config.compute.cpus_per_worker) == (1, None)
    assert config.storage_path == str(tmp_path)
    assert f"generate.model={folder}" in shlex.split(written)
    report = html.unescape(write_sweep_report(folder).read_text("utf-8"))
    assert longer.strip() in report and written.strip() in report


def test_a_winner_that_is_the_config_as_it_is_is_called_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gptray")
    config = sweep_config([{"path": "model.dropout", "uniform": [0.1, 0.3]}], "tune.num_samples=4")
    own, *others = trained(config, lambda values: (values["model.dropout"], 0.0))
    own.values = {}
    write_sweep(tmp_path / "sweep", config, [own, *others], winner=own.name)
    (tmp_path / "sweep" / "best.yaml").write_text(dump(config))
    tell_winner(load_sweep(tmp_path / "sweep"), str(tmp_path / "sweep"))
    assert "settings: the config as it is" in caplog.messages
