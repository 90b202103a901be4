"""What a sweep's report says of the amount of text, on sweeps whose curve is known."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptray.config import Config
from gptray.config.search_space import read_space
from gptray.reports.sweep.report import write_sweep_report
from gptray.tuning.draws import draw
from tests.reports.pages import Page
from tests.tuning.sweeps import Made, Values, sweep_config, write_sweep

FRACTIONS = {"path": "data.fraction", "grid": [0.125, 0.25, 0.5, 1.0]}
SEEDS = {"path": "seed", "grid": [1, 2, 3]}
MEASURED = {
    "paths": ["data.token_replacement", "model.dropout"],
    "grid": [[0, 0.0], [0.1, 0.0]],  # written as 0, which is the config's own 0.0
    "when": {"data.fraction": 0.25},
}
SECTION = "What more text would bring"


def by_text(values: Values) -> float:
    """0.15 bits per byte for each doubling; token replacement takes 0.12 off."""
    share, replaced = values.get("data.fraction", 1.0), values.get("data.token_replacement", 0.0)
    return float(2.6 - 0.15 * math.log2(share) - 1.2 * replaced)


def page_of(
    folder: Path,
    space: list[dict[str, Any]],
    loss: Callable[[Values], float] = by_text,
    outcome: str = "patience",
    rise: float = -0.001,
) -> Page:
    """rise: how much the loss of each run rises, or falls, from an evaluation to the next."""
    config = sweep_config(space, "tune.num_samples=1", "tune.baseline=false", "seed=1")
    made = []
    for number, values in enumerate(draw(read_space(config.tune.space, Config), 1, seed=1)):
        level = loss(values) + 0.01 * (int(str(values.get("seed", 2))) - 2)
        curve = [(level + max(rise * n, -rise * (11 - n)), 0.1) for n in range(12)]
        made.append(Made(f"{number:04d}", values, curve, outcome))
    return Page(write_sweep_report(write_sweep(folder, config, made), running=True))


def test_twice_the_text_and_the_worth_of_settings_are_told(tmp_path: Path) -> None:
    page = page_of(tmp_path, [FRACTIONS, SEEDS, MEASURED])
    twice = r"Twice the text: 2\.4[4-7] bits per byte instead of 2\.60 \(95%: 2\.4\d to 2\.[45]\d\)"
    assert re.search(twice, page.text)
    assert "Fitted: a straight line over the logarithm of the share" in page.text
    told = (
        r"What you did against overfitting \(data\.token_replacement=0\.1\) was worth as much as "
        r"1\.7 times the text \(95%: 1\.[56] to (1\.[89]|2\.0)\), with data\.fraction=0\.25\."
    )
    assert re.search(told, page.text)
    assert "Cut off by" not in page.text and "not a clear effect" not in page.text
    assert "seed 2 instead of 1" not in page.text
    assert page.text.index(SECTION) < page.text.index("Learning curves")


def test_settings_that_beat_the_whole_text_are_worth_more_than_it(tmp_path: Path) -> None:
    page = page_of(
        tmp_path,
        [FRACTIONS, SEEDS, MEASURED],
        lambda values: by_text(values) - 5 * values.get("data.token_replacement", 0.0),
    )
    assert "was worth more than 4.0 times the text, with data.fraction=0.25" in page.text


def test_settings_that_do_harm_or_nothing_are_told_as_such(tmp_path: Path) -> None:
    def with_lr(change: float) -> Callable[[Values], float]:
        return lambda values: by_text(values) + change * (values.get("optim.lr") == 1e-3)

    entry = {"path": "optim.lr", "grid": [2e-3, 1e-3], "when": {"data.fraction": 0.25}}
    page = page_of(tmp_path / "a", [FRACTIONS, SEEDS, entry], with_lr(0.1))
    assert "optim.lr=0.001 was worth 0.6 times the text" in page.text and "it did harm" in page.text
    page = page_of(tmp_path / "b", [FRACTIONS, SEEDS, entry], with_lr(0.001))
    assert "optim.lr=0.001 was worth 1.0 times the text" in page.text
    assert "which is not a clear effect" in page.text


def test_settings_of_the_smallest_share_are_told_from_nothing_only_if_they_did_more(
    tmp_path: Path,
) -> None:
    def with_lr(change: float) -> Callable[[Values], float]:
        return lambda values: by_text(values) + change * (values.get("optim.lr") == 1e-3)

    entry = {"path": "optim.lr", "grid": [2e-3, 1e-3], "when": {"data.fraction": 0.125}}
    for change in (-0.002, 0.002):
        page = page_of(tmp_path / f"{change}", [FRACTIONS, SEEDS, entry], with_lr(change))
        assert "which is not a clear effect" in page.text and "harm" not in page.text
    page = page_of(tmp_path / "worse", [FRACTIONS, SEEDS, entry], with_lr(0.1))
    assert "was worth less than 1.0 times the text, with data.fraction=0.125: it did" in page.text
    page = page_of(tmp_path / "better", [FRACTIONS, SEEDS, entry], with_lr(-0.1))
    assert "was worth as much as 1." in page.text


def test_nothing_is_said_where_text_did_not_help(tmp_path: Path) -> None:
    page = page_of(tmp_path, [FRACTIONS, SEEDS, MEASURED], lambda values: 2.6)
    assert (
        "More text did not help as far as these trials tell: from data.fraction=0.125" in page.text
    )
    assert "Twice the text:" not in page.text and "times the text" not in page.text


def test_too_few_seeds_or_shares_are_said_to_be_too_few(tmp_path: Path) -> None:
    two = {"path": "data.fraction", "grid": [0.5, 1.0]}
    for number, space in enumerate(([FRACTIONS], [two, SEEDS])):
        page = page_of(tmp_path / f"{number}", space)
        assert "Not enough trials to say what more text would bring: it takes 3" in page.text
        assert "Twice the text:" not in page.text


def test_runs_that_were_cut_off_and_runs_of_the_whole_text_are_named(tmp_path: Path) -> None:
    whole = MEASURED | {"when": {"data.fraction": 1.0}}
    page = page_of(tmp_path, [FRACTIONS, SEEDS, whole], outcome="finished")
    assert "Cut off by train.max_steps: runs with data.fraction=0.125, 0.25, 0.5, 1." in page.text
    assert "data.token_replacement=0.1 were run with data.fraction=1 only" in page.text


def test_runs_that_were_lowest_long_before_their_end_were_not_cut_off(tmp_path: Path) -> None:
    page = page_of(tmp_path, [FRACTIONS, SEEDS], outcome="finished", rise=0.01)
    assert "Twice the text:" in page.text and "Cut off by" not in page.text


def test_a_sweep_of_one_amount_of_text_says_nothing_of_it(tmp_path: Path) -> None:
    space = [SEEDS, {"path": "model.dropout", "grid": [0.0, 0.1, 0.2]}]
    assert SECTION not in page_of(tmp_path, space).text
