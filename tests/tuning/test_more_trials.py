"""What ten more trials would gain, and how often that turns out to be more than was said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptray.config import Config, load_config
from gptray.storage.record import MetricsRow
from gptray.tuning.more_trials import Gain, StoppedEarly, expected_gain, judges
from gptray.tuning.sweep_record import Record, Trial


def trial(
    number: int,
    score: float,
    outcome: str = "finished",
    *,
    values: dict[str, Any] | None = None,
    **more: Any,
) -> Trial:
    row: MetricsRow = {"step": 10, "val_bpb": score}
    values = {"optim.lr": float(number)} if values is None else values
    name = f"{number:04d}"
    return Trial(name, values, 10, None, outcome, True, 10, None, [row], **more)


def gain(scores: list[float]) -> Gain:
    found = Gain.of(scores, min(scores), draws=len(scores))
    assert found
    return found


def test_the_gain_is_in_the_unit_of_the_scores_and_grows_with_their_spread() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(2, 0.1, 40)
    one, ten = gain(list(scores)), gain(list(2 + 10 * (scores - 2)))
    assert 0 < one.mean < one.most < 0.3
    assert (ten.mean, ten.most) == pytest.approx((10 * one.mean, 10 * one.most))


def test_more_trials_gain_less_the_more_have_run() -> None:
    quantiles = [np.linspace(0, 1, n + 2)[1:-1] for n in (12, 40, 200)]
    few, some, many = (gain(list(one)) for one in quantiles)
    assert few.most > some.most > many.most and few.mean > some.mean > many.mean
    assert gain([2.0] * 12).most < 1e-6


def test_a_trial_that_waits_at_a_rung_counts_as_a_draw_of_which_nothing_came() -> None:
    whole = [trial(number, 2 + number / 100) for number in range(6)]
    alone = expected_gain(whole)
    assert alone is None  # too few
    cut = [trial(6 + number, 3.0, "stopped") for number in range(40)]
    wrong = [trial(46 + number, 1.0, "diverged") for number in range(4)]
    found = expected_gain([*whole, *cut, *wrong])
    assert found == Gain.of([2 + number / 100 for number in range(6)], 2.0, draws=50)
    assert found is not None
    left_out = [
        trial(50, 2.0, "failed", passing=True), trial(51, 2.0, "skipped"),
        trial(52, 5.0, values={}),
    ]  # fmt: skip
    assert expected_gain([*whole, *cut, *wrong, *left_out]) == found
    # The config as it is was not drawn; trials have to beat it all the same.
    ahead = expected_gain([*whole, *cut, *wrong, trial(52, 1.5, values={})])
    assert ahead and ahead.most < found.most and ahead.mean < found.mean


def test_of_sweeps_that_stop_few_would_have_gained_more() -> None:
    """Each is looked at after every fourth trial, and stops at the first chance."""
    rng, stopped, regretted = np.random.default_rng(3), 0, 0
    for _ in range(150):
        spread, n = np.exp(rng.uniform(np.log(0.01), np.log(0.2))), 92
        tails = [
            ((rng.random((n, 4)) - rng.random(4)) ** 2).sum(1),
            rng.normal(0, 0.3, n),
            np.exp(rng.normal(0, 0.7, n)),
        ]
        scores = 2 + spread * tails[rng.integers(3)]
        for number in range(30, 82, 4):
            if gain(list(scores[:number])).most < 0.01:
                stopped += 1
                more = scores[number : number + 10].min()
                regretted += bool(scores[:number].min() - more > 0.01)
                break
    assert stopped > 75
    assert regretted <= 0.05 * stopped


def config(*words: str, space: str = "[{path: model.dropout, uniform: [0, 0.3]}]") -> Config:
    return load_config(None, [f"tune.space={space}", *words])


def test_only_random_trials_are_judged() -> None:
    assert judges(config())
    assert not judges(config("tune.min_gain=0"))
    assert not judges(config("tune.search_alg=optuna"))
    both = "[{path: model.dropout, uniform: [0, 0.3]}, {path: optim.lr, grid: [1e-3, 1e-2]}]"
    assert not judges(config(space=both))


def test_why_a_sweep_stopped_is_read_from_its_record_until_it_is_reopened(tmp_path: Path) -> None:
    record = Record(tmp_path)
    assert StoppedEarly.of_sweep(tmp_path) is None
    record.write("enough", trials=14, of=30, gain=0.0041, gain_at_most=0.0093, min_gain=0.01)
    stopped = StoppedEarly.of_sweep(tmp_path)
    assert stopped and json.loads(json.dumps(stopped.__dict__))["of"] == 30
    assert stopped.words == (
        "Stopped after 14 of 30 trials: 10 more would improve the best by 0.0041 bits per byte "
        "(95%: by 0.0093 at most), less than tune.min_gain=0.01; tune.min_gain=0 runs the others."
    )
    record.write("winner", trial="0000")
    assert StoppedEarly.of_sweep(tmp_path) == stopped
    record.write("reopened")
    assert StoppedEarly.of_sweep(tmp_path) is None
