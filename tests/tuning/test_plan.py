"""Which trials a sweep has, what is refused before any starts, and who wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from gptray.config import Config, ConfigError, TuneConfig, UserError, override
from gptray.storage.record import MetricsRow
from gptray.tuning.sweep_record import Trial
from gptray.tuning.trial_plan import (
    all_texts,
    choose_winner,
    lossy_ahead,
    mean_score,
    plan_trials,
    ranked,
    replicates,
)

LR = {"path": "optim.lr", "loguniform": [3e-4, 3e-3]}
DROPOUT = {"path": "model.dropout", "choice": [0.0, 0.1]}


def sweep(*space: dict[str, Any], **tune: Any) -> Config:
    keys = {f"tune.{key}": value for key, value in tune.items()}
    return override(
        Config(), {"storage_path": "/s", "name": "a", "tune.space": list(space), **keys}
    )


def trial(name: str, *scores: float, outcome: str = "finished", **given: Any) -> Trial:
    rows: list[MetricsRow] = [
        {"step": 10 * n, "val_bpb": score} for n, score in enumerate(scores, start=1)
    ]
    for row in rows if "lost" in given else []:
        row["val_lost"] = given["lost"]
    return Trial(
        name=name,
        values=given.get("values", {}),
        max_steps=40,
        replicate_of=given.get("replicate_of"),
        outcome=outcome,
        started=True,
        step=10 * len(rows),
        message=None,
        rows=rows,
    )


def names(trials: Sequence[Trial]) -> list[str]:
    return [one.name for one in trials]


def test_trials_are_ordinary_runs_of_the_sweeps_folder_and_split() -> None:
    first, *drawn = plan_trials(sweep(LR, num_samples=5), "/s/a")
    assert (first.name, first.values, len(drawn)) == ("0000", {}, 5)
    config = drawn[0].config
    assert (config.storage_path, config.name) == ("/s/a/trials", "0001")
    assert config.optim.lr == drawn[0].values["optim.lr"]
    assert (config.data.seed, config.seed, config.tune) == (
        Config().seed,
        Config().seed,
        TuneConfig(),
    )
    assert drawn[0] == plan_trials(sweep(LR, num_samples=5), "/s/a")[1]


def test_equal_trials_are_run_once() -> None:
    assert len(plan_trials(sweep(DROPOUT, num_samples=9), "/s/a")) == 2
    without = plan_trials(sweep(DROPOUT, num_samples=9, baseline=False), "/s/a")
    assert {one.values["model.dropout"] for one in without} == {0.0, 0.1}
    assert len(without) == 2


def test_a_grid_is_visited_once_for_each_draw() -> None:
    grid = {"path": "model.dropout", "grid": [0.1, 0.2, 0.3]}
    assert len(plan_trials(sweep(grid, LR, num_samples=4, baseline=False), "/s/a")) == 12
    assert len(plan_trials(sweep(grid, num_samples=4, baseline=False), "/s/a")) == 3


def test_a_trial_without_the_sweeps_adapter_trains_at_a_tenth_of_its_rate() -> None:
    given = {"model.init_from": "base", "lora.rank": 8, "optim.lr": 17e-3}
    for least in (None, 1e-3):
        config = override(sweep({"path": "lora.rank", "choice": [None]}), given)
        _, whole = plan_trials(override(config, {"optim.min_lr": least}), "/s/a")
        optim = whole.config.optim
        assert optim.lr == 0.0017
        assert optim.final_lr == pytest.approx((0.0017 if least is None else least) / 10)


def test_values_that_do_not_go_together_are_refused_with_the_trial() -> None:
    heads = {"path": "model.n_head", "choice": [4, 6]}
    low = {"paths": ["optim.lr", "optim.min_lr"], "choice": [[1e-4, 2e-4]]}
    with pytest.raises(ConfigError) as caught:
        plan_trials(sweep(heads, low), "/s/a")
    text = str(caught.value)
    assert "optim.min_lr=0.0002 must not be above optim.lr=0.0001" in text
    assert "model.n_embd=256 must be divisible by model.n_head=6" in text
    assert "(in a trial with model.n_head=6, optim.lr=0.0001, optim.min_lr=0.0002)" in text
    width = {"paths": ["model.n_head", "model.n_embd"], "choice": [[4, 128], [6, 96]]}
    assert len(plan_trials(sweep(width), "/s/a")) == 3


def test_splits_with_unequal_validation_are_refused() -> None:
    split = {"path": "data.split", "choice": ["90:10", "70:30"]}
    with pytest.raises(ConfigError, match="different text; there are 0.1, 0.3"):
        plan_trials(sweep(split), "/s/a")


def test_a_sweep_without_a_space_is_refused() -> None:
    with pytest.raises(UserError, match="tune.space is empty"):
        plan_trials(sweep(), "/s/a")


def test_every_text_is_known_before() -> None:
    fraction = {"path": "data.fraction", "choice": [0.5, 1.0]}
    split = {"path": "data.split", "choice": ["90:10", "80:10:10"]}
    drawn = sweep(fraction, split, LR, num_samples=8)
    texts = all_texts(drawn, "/s/a", plan_trials(drawn, "/s/a"))
    found = {(text.data.fraction, len(text.data.split)) for text in texts}
    assert len(texts) == len(found) == 4
    assert {text.storage_path for text in texts} == {"/s"}
    suggested = override(drawn, {"tune.search_alg": "optuna"})
    assert [one.name for one in plan_trials(suggested, "/s/a")] == ["0000"]
    assert len(all_texts(suggested, "/s/a", plan_trials(suggested, "/s/a"))) == 4
    endless = sweep({"path": "data.fraction", "uniform": [0.1, 1.0]}, search_alg="optuna")
    with pytest.raises(ConfigError, match="data.fraction: with tune.search_alg=optuna"):
        plan_trials(endless, "/s/a")


def test_noise_in_batches_makes_no_text() -> None:
    noisy = sweep({"path": "data.token_replacement", "uniform": [0.0, 0.2]})
    trials = plan_trials(noisy, "/s/a")
    assert len({one.config.data.token_replacement for one in trials}) == len(trials) > 2
    assert len(all_texts(noisy, "/s/a", trials)) == 1
    suggested = override(noisy, {"tune.search_alg": "optuna"})
    assert len(all_texts(suggested, "/s/a", plan_trials(suggested, "/s/a"))) == 1


def test_the_best_sound_trial_wins() -> None:
    trials = [
        trial("0000", 3.0, 2.0, 2.5, outcome="patience"),
        trial("0001", 2.1, outcome="stopped"),
        trial("0002", 1.0, outcome="diverged"),
        trial("0003", 1.5, outcome="failed"),
        trial("0004", outcome="failed"),
    ]
    assert names(ranked(trials)) == ["0000", "0001"]
    assert (choose_winner(trials) or trials[1]).name == "0000"
    assert choose_winner(trials[2:]) is None


def test_the_best_three_are_repeated_with_other_seeds_and_the_mean_decides() -> None:
    config = sweep(LR, replicates=2)
    trials = [trial(f"000{n}", 2.0 + n / 10, values={"optim.lr": 1e-3 * (n + 1)}) for n in range(5)]
    planned = replicates(config, "/s/a", trials)
    assert [one.replicate_of for one in planned] == ["0000"] * 2 + ["0001"] * 2 + ["0002"] * 2
    assert [one.name for one in planned[:2]] == ["0005", "0006"]
    assert [one.config.seed for one in planned[:2]] == [Config().seed + 1, Config().seed + 2]
    assert planned[0].config.optim.lr == 1e-3 and planned[0].config.data.seed == Config().seed
    assert replicates(sweep(LR), "/s/a", trials) == []
    repeated = [
        *trials,
        trial("0005", 2.9, replicate_of="0000"),
        trial("0006", 2.2, outcome="diverged", replicate_of="0001"),
        trial("0007", 2.3, replicate_of="0002"),
        trial("0008", 9.0, outcome="failed", replicate_of="0002"),
    ]
    winner = choose_winner(repeated)
    assert winner and winner.name == "0002" and mean_score(winner, repeated) == pytest.approx(2.25)


def test_trials_that_lose_text_are_told_where_they_are_ahead() -> None:
    honest, lossy = trial("a", 2.0), trial("b", 1.9, lost=0.02)
    behind, wrong = trial("c", 2.5, lost=0.5), trial("d", 1.0, outcome="failed", lost=0.9)
    assert names(lossy_ahead([honest, lossy, behind, wrong], lossy)) == ["b"]
    assert lossy_ahead([honest, behind], honest) == []
    # Alone at the front, or made the winner by its repetitions.
    assert names(lossy_ahead([lossy, behind], lossy)) == ["b"]
    assert names(lossy_ahead([honest, behind], behind)) == ["c"]
    assert lossy_ahead([], None) == []


def test_repetitions_that_are_there_are_not_planned_again() -> None:
    config = sweep(LR, replicates=1)
    trials = [trial(f"000{n}", 2.0 + n / 10, values={"optim.lr": 1e-3 * (n + 1)}) for n in range(4)]
    seed = {"seed": Config().seed + 1}
    trials += [trial(f"000{n + 4}", 2.0, values=seed, replicate_of=f"000{n}") for n in range(3)]
    assert replicates(config, "/s/a", trials) == []
    best = [*trials, trial("0007", 1.0, values={"optim.lr": 0.5})]
    (planned,) = replicates(config, "/s/a", best)
    assert (planned.name, planned.replicate_of) == ("0008", "0007")
