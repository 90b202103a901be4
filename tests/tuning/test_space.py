"""What is drawn from a space: all of a grid, every stratum of the rest, the same for a seed."""

from __future__ import annotations

from collections import Counter

import pytest

from gptray.config import UserError
from gptray.config.search_space import Entry
from gptray.tuning.draws import Values, draw, grid_points

DROPOUT = Entry(("model.dropout",), "uniform", low=0.0, high=0.3)
SCHEDULE = Entry(("optim.schedule",), "choice", (("constant",), ("cosine",), ("step",)))
STEP_SIZE = Entry(("optim.step_size",), "randint", low=0, high=5, when={"optim.schedule": ["step"]})
SIZE = Entry(("model.n_layer", "model.n_embd"), "grid", ((2, 64), (4, 32)))
NORM = Entry(("model.norm",), "grid", (("none",), ("layernorm",)), when={"model.n_layer": [4]})


def stratum(values: Values) -> int:
    """Which fifteenth of its range a trial's dropout is in."""
    dropout = values["model.dropout"]
    assert isinstance(dropout, float)
    return int(dropout / 0.3 * 15)


def test_draws_are_a_function_of_the_seed_and_cover_every_stratum() -> None:
    entries = [DROPOUT, SCHEDULE, STEP_SIZE]
    trials = draw(entries, 15, seed=3)
    assert trials == draw(entries, 15, seed=3) != draw(entries, 15, seed=4)
    assert sorted(map(stratum, trials)) == list(range(15))
    assert set(Counter(values["optim.schedule"] for values in trials).values()) == {5}
    # The condition leaves five trials, which have the five values.
    sizes = [v["optim.step_size"] for v in trials if v["optim.schedule"] == "step"]
    assert set(sizes) == set(range(5)) and len(sizes) == 5
    assert all("optim.step_size" not in v for v in trials if v["optim.schedule"] != "step")


def test_further_draws_are_a_hypercube_of_their_own() -> None:
    first, more = draw([DROPOUT], 15, seed=3), draw([DROPOUT], 15, seed=3, after=15)
    assert more == draw([DROPOUT], 15, seed=3, after=15)
    assert not {v["model.dropout"] for v in first} & {v["model.dropout"] for v in more}
    assert sorted(map(stratum, more)) == list(range(15))
    assert more != draw([DROPOUT], 15, seed=3, after=30)


def test_a_new_entry_leaves_the_values_of_the_others() -> None:
    few, more = draw([SCHEDULE], 8, seed=0), draw([DROPOUT, SCHEDULE], 8, seed=0)
    assert [v["optim.schedule"] for v in few] == [v["optim.schedule"] for v in more]


def test_grid_is_every_combination_that_its_conditions_leave() -> None:
    points = [
        {"model.n_layer": 2, "model.n_embd": 64},
        {"model.n_layer": 4, "model.n_embd": 32, "model.norm": "none"},
        {"model.n_layer": 4, "model.n_embd": 32, "model.norm": "layernorm"},
    ]
    assert grid_points([SIZE, NORM]) == points
    trials = draw([SIZE, DROPOUT, NORM], 2, seed=0)
    without = [{k: v for k, v in values.items() if k != "model.dropout"} for values in trials]
    assert without == [*points, *points]
    assert len({values["model.dropout"] for values in trials}) == 6
    assert list(trials[1]) == ["model.n_layer", "model.n_embd", "model.dropout", "model.norm"]


def test_more_trials_than_a_sweep_can_have_are_refused_before_they_are_drawn() -> None:
    ten = tuple((number,) for number in range(10))
    grid = [Entry((f"model.{letter}",), "grid", ten) for letter in "abcdefghijkl"]
    with pytest.raises(UserError, match="more than 10,000 combinations"):
        grid_points(grid)
    with pytest.raises(UserError, match=r"num_samples=1001 draws 10,010 trials.* 10 points"):
        draw(grid[:1], 1, seed=0, after=1000)
    assert len(grid_points(grid[:4])) == 10_000
