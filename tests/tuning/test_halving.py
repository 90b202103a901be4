"""Who waits at a rung and who goes on, at once or later, also after a restart."""

from __future__ import annotations

import pytest

from gptray.config import Config, override
from gptray.storage.record import MetricsRow
from gptray.tuning.halving import Halving
from gptray.tuning.sweep_record import Trial

# Rungs at steps 10 and 30.
CONFIG = override(
    Config(), {"train.max_steps": 60, "train.eval_interval": 5, "tune.grace_period": 2}
)


def row(step: int, score: float) -> MetricsRow:
    return {"step": step, "val_bpb": score}


def past(
    name: str, *scores: float, outcome: str | None = "stopped", of: str | None = None
) -> Trial:
    rows = [row(5 * n, score) for n, score in enumerate(scores, start=1)]
    return Trial(name, {}, 60, of, outcome, True, 5 * len(rows), None, rows)


def come(halving: Halving, name: str, score: float, *, step: int = 10) -> bool:
    """Whether a trial that comes to a step goes on."""
    return halving.continues(name, row(step, score), max_steps=60)


def test_a_trial_waits_until_it_is_among_the_best_third() -> None:
    halving = Halving(CONFIG)
    assert halving.continues("0000", row(5, 9.0), max_steps=60)  # no rung yet
    assert not come(halving, "0000", 2.0) and not come(halving, "0001", 3.0)
    assert halving.promote({"0000", "0001"}) is None
    assert not come(halving, "0002", 4.0)
    assert halving.promote({"0001", "0002"}) is None  # the best is not among them
    assert halving.promote({"0000", "0001", "0002"}) == "0000"
    assert halving.promote({"0001", "0002"}) is None
    assert not come(halving, "0003", 5.0) and not come(halving, "0004", 6.0)
    assert come(halving, "0005", 1.0)  # at once
    assert not come(halving, "0006", 7.0) and not come(halving, "0007", 7.0)
    assert not come(halving, "0008", 7.0)
    assert halving.promote({"0001", "0002"}) == "0001"  # three of nine go on


def test_the_highest_rung_comes_first() -> None:
    halving = Halving(CONFIG)
    waiting = {f"{number:04d}" for number in range(12)}
    for name in sorted(waiting):
        assert not come(halving, name, 4.0 + int(name) / 10)
    for name in ("0000", "0001", "0002"):  # promoted before a kill
        assert not come(halving, name, 2.0, step=30)
    assert halving.promote(waiting) == "0000"
    assert halving.promote(waiting) == "0003" and halving.promote(waiting) is None


def test_at_the_end_the_best_of_each_rung_goes_on() -> None:
    halving = Halving(CONFIG)
    assert not come(halving, "0000", 3.0) and not come(halving, "0001", 2.0)
    assert halving.promote({"0000", "0001"}) is None
    assert halving.promote({"0000", "0001"}, last=True) == "0001"
    assert not come(halving, "0001", 2.0, step=30)
    assert halving.promote({"0000", "0001"}, last=True) == "0001"
    assert halving.promote({"0000"}, last=True) is None


@pytest.mark.parametrize("outcome", ["diverged", "failed"])
def test_a_trial_that_goes_wrong_leaves_its_place_to_the_next(outcome: str) -> None:
    halving = Halving(CONFIG)
    for name, score in (("0000", 2.0), ("0001", 3.0), ("0002", 4.0)):
        assert not come(halving, name, score)
    assert halving.promote({"0000", "0001", "0002"}) == "0000"
    assert halving.promote({"0001", "0002"}, last=True) is None
    halving.ended("0000", outcome)
    assert halving.promote({"0001", "0002"}) == "0001"
    restarted = Halving(CONFIG, [past("0000", 3.0, 2.0, outcome=outcome), past("0001", 3.0, 3.0)])
    assert restarted.promote({"0001"}) is None
    assert restarted.promote({"0001"}, last=True) == "0001"


def test_a_trial_whose_workers_ran_past_the_rung_still_waits_after_a_restart() -> None:
    ahead = past("0000", 3.0, 2.0, 1.9)
    halving = Halving(CONFIG, [ahead, past("0001", 3.0, 3.0), past("0002", 3.0, 4.0)])
    assert halving.waits("0000") and halving.promote({"0000", "0001", "0002"}) == "0000"


def test_a_landing_the_end_and_repetitions_are_not_compared() -> None:
    repeated = past("0004", 0.1, 0.1, of="0000")
    halving = Halving(CONFIG, [past("0000", 3.0, 3.0), past("0001", 4.0, 4.0), repeated])
    landing: MetricsRow = {"step": 10, "val_bpb": 0.1, "phase": "landing"}
    assert halving.continues("0002", landing, max_steps=60)
    assert halving.continues("0003", row(10, 9.0), max_steps=10)
    assert halving.promote({"0000", "0001"}) == "0000"


def test_what_was_measured_before_the_start_counts() -> None:
    ended = [past("0000", 3.0, 2.0), past("0001", 3.0, 1.9, 1.8, outcome=None)]
    halving = Halving(CONFIG, [*ended, past("0002", 9.0), past("0003", 3.0, 2.1, outcome=None)])
    assert [halving.waits(f"{number:04d}") for number in range(4)] == [True, False, False, True]
    assert halving.promote({"0000", "0003"}) is None  # the best has gone on
    assert not come(halving, "0003", 2.1)  # reported once more by a trial that was killed
    assert not come(halving, "0002", 9.0) and not come(halving, "0004", 9.0)
    assert not come(halving, "0005", 9.0)
    assert halving.promote({"0000", "0003"}) == "0000"


def test_a_trial_stays_in_its_bracket_where_the_first_rung_may_be_a_later_one() -> None:
    config = override(CONFIG, {"tune.brackets": 2})
    waits = []
    for number in range(20):
        name = f"{number:04d}"
        here = [not come(Halving(config), name, 9.0, step=step) for step in (10, 30)]
        assert here == [not come(Halving(config), name, 9.0, step=step) for step in (10, 30)]
        assert here[1]
        waits.append(here[0])
    assert 0 < sum(waits) < 20


@pytest.mark.parametrize("grace", [12, 40])
def test_without_rungs_all_go_on(grace: int) -> None:
    halving = Halving(override(CONFIG, {"tune.grace_period": grace}))
    assert come(halving, "0000", 9.0, step=60) and halving.promote({"0000"}, last=True) is None
