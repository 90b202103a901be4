"""What a report says of a landing: its sentence, numbers and curve, and the model it chose."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptray.config import Config
from gptray.reports.chart import run_charts
from gptray.reports.run.advice import advise
from gptray.reports.run.diagnosis import diagnose
from gptray.reports.run.report import write_report
from gptray.reports.run.sentence import sentence
from gptray.storage.record import Event
from tests.reports.curves import Rows, config_of, evaluated, rows_of, started, write_run
from tests.reports.pages import Page

STABLE = [4.0, 3.0, 2.5, 2.2, 2.05, 2.0, 2.01, 2.1, 2.2, 2.3]


def landed(*losses: float) -> tuple[Rows, Config, list[Event]]:
    """A run that was patient until step 100, went back to step 60, and landed."""
    rows = rows_of([*STABLE, *losses], train=[1.9] * (len(STABLE) + len(losses)))
    for number, row in enumerate(rows):
        row["phase"] = "stable" if number < len(STABLE) else "landing"
    until = rows[-1]["step"]
    config = config_of(rows, "optim.schedule=wsd", "train.max_steps=500", "train.patience=4")
    begun: Event = {
        "event": "landing",
        "time": 5.0,
        "step": 100,
        "back_to": 60,
        "until": until,
        "message": "landing: going back to step 60",
    }
    return rows, config, [started(), begun]


def test_a_landing_is_told_after_the_stable_part_with_its_gain() -> None:
    rows, config, events = landed(1.9, 1.8)
    diagnosis = diagnose(rows, config, events)
    assert (diagnosis.verdict, diagnosis.ended) == ("overfitting", "patience")
    assert diagnosis.chosen and diagnosis.chosen.step == 120
    assert sentence(diagnosis, config).startswith(
        "Validation loss was best at step 60 (2.00); early stopping ended training 40 steps later "
        "and saved 380 steps (6.3 min). Landing from step 60 took it to 1.80, 0.20 lower. Try: "
    )


def test_a_landing_that_did_not_help_leaves_the_model_from_before() -> None:
    rows, config, events = landed(2.2, 2.03)
    diagnosis = diagnose(rows, config, events)
    assert diagnosis.chosen == diagnosis.best
    told = "Landing from step 60 did not help: 2.03, 0.03 higher, so the model is from before it."
    assert told in sentence(diagnosis, config)


def test_a_run_that_is_cut_off_in_its_landing_has_not_ended() -> None:
    rows, config, events = landed(1.9, 1.8)
    assert diagnose(rows[:-1], config, events).ended is None
    assert diagnose(rows[: len(STABLE)], config, events).ended is None
    assert diagnose(rows, config, events[:1]).ended is None


def test_what_would_train_it_longer_is_a_new_run() -> None:
    losses = [4.0, 3.5, 3.1, 2.8, 2.6, 2.45, 2.35, 2.3, 2.0]
    rows = rows_of(losses)
    for row in rows:
        row["phase"] = "landing" if row["step"] == 90 else "stable"
    config = config_of(rows, "optim.schedule=wsd")
    ended: Event = {"event": "end", "time": 9.0, "stopped": "max_steps"}
    diagnosis = diagnose(rows, config, [started(), ended])
    assert diagnosis.verdict == "falling"
    assert [(item.change, item.resumes) for item in advise(diagnosis, config)] == [
        ("more steps", False)
    ]


def test_the_page_shows_the_landing_from_where_it_went_back_to(tmp_path: Path) -> None:
    rows, config, events = landed(1.9, 1.8)
    events += [evaluated(step, [["Once", f" upon {step}"]]) for step in (60, 120)]
    events.append({"event": "end", "time": 9.0, "stopped": "patience"})
    page = Page(write_report(write_run(tmp_path / "run", rows, events, config)))
    assert "stopped early and landed at step 120 of 500" in page.text
    assert "landed: step 120 (1.80)" in page.text and "best: step 60 (2.00)" in page.text
    assert "Gain of the landing" in page.text and "+0.2000" in page.text
    assert "went back from step 100 to step 60" in page.text
    assert "1.800 best validation loss, step 120" in page.text
    assert "Step 120, the best" in page.text
    assert "landing: going back to step 60" in page.text
    series = {
        one.role: one.points for one in run_charts(rows, diagnose(rows, config, events))[0].series
    }
    assert series["landed"] == ((60, 2.0), (110, 1.9), (120, 1.8))
    assert series["val"][-1] == (100, 2.3)


@pytest.mark.parametrize("losses", [(1.9,), (2.5,)])
def test_columns_begin_with_the_models(losses: tuple[float, ...], tmp_path: Path) -> None:
    rows, config, events = landed(*losses)
    page = Page(write_report(write_run(tmp_path / "run", rows, events, config)))
    names = ["landed: step", "best: step", "turned: step", "last: step"]
    if losses[0] > min(STABLE):
        names = [*names[1:], names[0]]
    places = [page.text.replace("\u00a0", " ").rfind(name) for name in names]
    assert places == sorted(places) and -1 not in places
