"""Who is cut at a rung, also after a restart; what Optuna is told; how a machine is shared out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptray.config import Config, dump, override
from gptray.jobs.resources import trial_resources
from gptray.jobs.train.task import TrainTask
from gptray.jobs.tune.rungs import Rungs
from gptray.jobs.tune.suggestions import Suggestions
from gptray.jobs.tune.task import TrialTask
from gptray.jobs.tune.worker import run_trial
from gptray.record import METRICS, MetricsRow
from gptray.tuning.sweep_record import Record, Trial, load_trials, trial_dir
from gptray.tuning.trial_plan import Planned

# Rungs at steps 10 and 30.
CONFIG = override(
    Config(), {"train.max_steps": 60, "train.eval_interval": 5, "tune.grace_period": 2}
)


def past(
    name: str, *scores: float, outcome: str | None = "finished", of: str | None = None
) -> Trial:
    rows: list[MetricsRow] = [
        {"step": 5 * n, "val_bpb": score} for n, score in enumerate(scores, start=1)
    ]
    return Trial(name, {}, 60, of, outcome, True, 5 * len(rows), None, rows)


def live(rungs: Rungs, name: str, *, is_cut: bool = True) -> SimpleNamespace:
    run = TrainTask(CONFIG, Path(), Path(), threads=1)
    task = TrialTask(name, run, is_cut, reserved={})
    trial = SimpleNamespace(trial_id=f"ray-{name}", config={"task": task})
    rungs.on_trial_add(None, trial)
    return trial


def decisions(rungs: Rungs, trial: Any, *scores: float, since: int = 0) -> list[str]:
    rows = [{"step": since + 5 * n, "val_bpb": score} for n, score in enumerate(scores, start=1)]
    return [rungs.on_trial_result(None, trial, row) for row in rows]


ENDED = [past("0000", 3.0, 2.0, 2.0), past("0001", 3.0, 2.2, outcome="stopped"), past("0002", 9.0)]


def test_a_new_trial_is_compared_with_what_ended_before_the_start() -> None:
    rungs = Rungs(CONFIG, ENDED)
    assert decisions(rungs, live(rungs, "0003"), 9.0, 1.9) == ["CONTINUE", "CONTINUE"]
    assert decisions(rungs, live(rungs, "0004"), 1.0, 2.1) == ["CONTINUE", "STOP"]
    alone = Rungs(CONFIG, [])
    assert decisions(alone, live(alone, "0003"), 9.0, 9.0, 9.0) == ["CONTINUE"] * 3


def test_a_trial_that_goes_on_is_not_judged_again_at_a_rung_behind_it() -> None:
    rungs = Rungs(CONFIG, [*ENDED, past("0003", 3.0, 8.0, 7.0, outcome=None)])
    trial = live(rungs, "0003")
    assert decisions(rungs, trial, 7.0, 7.0, since=15) == ["CONTINUE", "CONTINUE"]
    # And what it had at that rung counts for others: 1.9 is among the best third of four.
    assert decisions(rungs, live(rungs, "0004"), 9.0, 1.9) == ["CONTINUE", "CONTINUE"]


@pytest.mark.parametrize(
    ("name", "scores", "step"),
    [
        ("0003", (9.0, 3.0), 10),  # reported to a rung at 10, and worse than the third that stays
        ("0003", (9.0, 1.9), None),
        ("0003", (9.0, 3.0, 3.0), None),  # it was let past the rung
        ("0003", (9.0,), None),
        ("0003", (9.0,) * 12, None),  # at its end
        ("0004", (9.0, 3.0), None),  # has no past
    ],
)
def test_a_trial_whose_cut_a_kill_came_before_is_not_run_on(
    name: str, scores: tuple[float, ...], step: int | None
) -> None:
    rungs = Rungs(CONFIG, [*ENDED, past("0003", *scores, outcome=None)])
    assert rungs.cut_before(Planned(name, {}, CONFIG)) == step
    assert rungs.cut_before(Planned(name, {}, CONFIG)) == step  # to ask changes nothing


def test_the_last_step_and_repetitions_are_not_cut() -> None:
    rungs = Rungs(CONFIG, [past("0000", *[1.0] * 12), past("0001", 0.1, 0.1, of="0000")])
    assert decisions(rungs, live(rungs, "0002", is_cut=False), *[9.0] * 12) == ["CONTINUE"] * 12
    trial = live(rungs, "0003")
    assert decisions(rungs, trial, 9.0, since=55) == ["CONTINUE"]
    # The repetition's 0.1 is on no rung.
    assert decisions(rungs, live(rungs, "0004"), 9.0, 0.9) == ["CONTINUE", "CONTINUE"]


def test_a_trial_stays_in_its_bracket() -> None:
    config = override(CONFIG, {"tune.brackets": 2})
    cut = []
    for number in range(20):
        rungs = Rungs(config, [past("best", 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)])
        again = Rungs(config, [past("best", 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)])
        name = f"{number:04d}"
        first = decisions(rungs, live(rungs, name), *[9.0] * 7)
        assert first == decisions(again, live(again, name), *[9.0] * 7)
        cut.append(first.index("STOP") if "STOP" in first else None)
    assert len(set(cut)) > 1


@pytest.fixture
def suggesting(tmp_path: Path) -> Config:
    space = [
        {"path": "model.n_head", "choice": [4, 6]},
        {"path": "optim.schedule", "choice": ["step", "cosine"]},
        {"path": "optim.step_size", "randint": [5, 9], "when": {"optim.schedule": "step"}},
    ]
    keys = {"name": "a", "tune.space": space, "tune.search_alg": "optuna"}
    config = override(Config(), {**keys, "storage_path": str(tmp_path.parent)})
    (tmp_path / "config.yaml").write_text(dump(config))
    return config


def test_optuna_suggests_what_goes_together_and_learns_on(
    suggesting: Config, tmp_path: Path
) -> None:
    def finish(name: str, suggestions: Suggestions, record: Record) -> None:
        run = trial_dir(tmp_path, name)
        run.mkdir(parents=True)
        (run / METRICS).write_text(
            json.dumps({"step": 10, "train_loss": 1.0, "val_bpb": 2.0}) + "\n"
        )
        record.ended(name, "finished", step=10)
        suggestions.over(name)

    record = Record(tmp_path)
    suggestions = Suggestions(suggesting, tmp_path, record, num_trials=10)
    planned = [one for one in (suggestions.suggest() for _ in range(3)) if one]
    for plan in planned:
        finish(plan.name, suggestions, record)
    before = [(one.values, one.point) for one in load_trials(tmp_path)]
    record = Record(tmp_path)
    suggestions = Suggestions(suggesting, tmp_path, record, num_trials=10)
    while following := suggestions.suggest():
        planned.append(following)
        finish(following.name, suggestions, record)
    trials = load_trials(tmp_path)
    assert (
        len(trials) == 10 and [(one.values, one.point) for one in trials][: len(before)] == before
    )
    # A width of 256 has no 6 heads: such a trial failed before it began.
    failed = [one for one in trials if one.outcome == "failed"]
    assert failed and all(one.values["model.n_head"] == 6 for one in failed)
    assert all("divisible" in (one.message or "") for one in failed)
    assert len(planned) + len(failed) == 10
    for one in trials:
        assert ("optim.step_size" in one.values) == (one.values["optim.schedule"] == "step")
        assert one.values.get("optim.step_size", 5) in range(5, 9)
    assert len({json.dumps(one.point) for one in trials}) == 10
    # A repetition is none of the ten, and has a name of its own.
    record.planned("0010", {"seed": 2}, max_steps=60, replicate_of="0000")
    suggestions = Suggestions(suggesting, tmp_path, record, num_trials=11)
    suggestions.suggest()
    assert [one.name for one in load_trials(tmp_path)][-2:] == ["0010", "0011"]


@pytest.mark.parametrize(
    ("keys", "trials", "at_once", "expected"),
    [
        ({}, 16, None, (2, 1.0)),
        ({}, 1, None, (1, 2.0)),
        ({}, 16, 1, (1, 2.0)),
        ({}, 16, 5, (2, 1.0)),
        ({"compute.cpus_per_worker": 2}, 16, None, (1, 2.0)),
        ({"compute.num_workers": 2}, 16, None, (1, 1.0)),
        ({"compute.num_workers": 4}, 16, None, (1, 0.5)),
    ],
)
def test_trials_share_two_cores_out(
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    trials: int,
    at_once: int | None,
    expected: tuple[int, float],
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    compute = override(Config(), {**keys, "train.global_batch_size": 16}).compute
    number, reserved = trial_resources(compute, trials=trials, at_once=at_once)
    assert (number, reserved["CPU"]) == expected


def test_a_trial_whose_text_is_gone_may_run_again(tmp_path: Path) -> None:
    run = TrainTask(CONFIG, tmp_path / "gone", tmp_path, threads=1)
    result = run_trial(TrialTask("0000", run, is_cut=True, reserved={}))
    assert (result["outcome"], result["passing"]) == ("failed", True)
    assert "manifest.json cannot be read" in str(result["message"])
