"""A search space in a config: what it may say, and every mistake in it with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptray.config import Config, ConfigError, dump, load_config, override
from gptray.config.search_space import Entry, read_space

SOUND: list[dict[str, Any]] = [
    {"path": "model.dropout", "uniform": [0, 0.3]},
    {"paths": ["model.n_layer", "model.n_embd"], "choice": [[2, 128], [4, 256.0]]},
    {"paths": ["model.n_positions", "train.block_size"], "choice": [64, 128]},
    {"path": "optim.schedule", "choice": ["constant", "step", "cosine"]},
    {"path": "optim.step_size", "randint": [10, 20], "when": {"optim.schedule": "step"}},
    {"path": "optim.warmup_steps", "choice": [1e1], "when": {"optim.schedule": ["step", "cosine"]}},
    {"path": "optim.max_grad_norm", "choice": [None, 1.0]},
    {"path": "data.split", "grid": ["90:10", "80:10:10"]},
]


def problems_of(space: list[dict[str, Any]]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        override(Config(), {"tune.space": space})
    return caught.value.problems


def test_every_mistake_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "optim: {lrr: 3}\n"
        "tune:\n"
        "  space:\n"
        "  - path: model.dropot\n"
        "    uniform: [0, 0.3]\n"
        "  - path: model.dropout\n"
        "    uniform: [0, 1]\n"
        "  - path: optim.schedule\n"
        "    choice: [cosine, stepp]\n"
        "    when: {model.drop: 1}\n"
        "  - path: optim.step_size\n"
        "    randint: [10, 100]\n"
        "    when:\n"
        "      optim.schedule: [cosine, cosin]\n"
        "  - paths: [model.n_layer, model.n_embd]\n"
        "    choice: [[2, 128], [4, 256, 1]]\n"
        "  - {path: optim.lr, log_uniform: [1e-4, 1e-2]}\n"
        "  - path: optim.lr\n"
        "    path: optim.min_lr\n"
        "    choice: [1e-4]\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), ["tune.grace_period=0"])
    assert caught.value.problems == [
        f"{path}:1: unknown key optim.lrr; did you mean optim.lr?",
        f"{path}:4: tune.space: unknown path model.dropot; did you mean model.dropout?",
        f"{path}:7: tune.space: model.dropout: must be below 1, got 1.0",
        f"{path}:9: tune.space: optim.schedule: expects constant, linear, cosine, step or wsd, got "
        "'stepp'; did you mean step?",
        f"{path}:10: tune.space: when: no entry before this one varies model.drop; did you mean "
        "model.dropout?",
        f"{path}:13: tune.space: when: optim.schedule is never 'cosin' here; did you mean cosine?",
        f"{path}:16: tune.space: [4, 256, 1] has 3 values for 2 paths; give one each, or one for "
        "all",
        f"{path}:17: tune.space: unknown word log_uniform; did you mean loguniform?",
        f"{path}:19: path is given twice (first on line 18)",
        "command line: tune.grace_period: must be above 0, got 0",
    ]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"choice": [1]}, "needs either path or paths"),
        ({"path": "seed", "paths": ["seed"], "choice": [1]}, "needs either path or paths"),
        ({"paths": "seed", "choice": [1]}, "expects a list"),
        ({"paths": ["seed", "seed"], "choice": [1]}, "names a path twice"),
        ({"path": ["seed"], "choice": [1]}, "unknown path"),
        ({"path": "seed"}, "needs one of choice, grid, uniform, loguniform, randint"),
        ({"path": "seed", "choice": [1], "grid": [2]}, "has choice and grid"),
        ({"path": "seed", "choice": []}, "expects a list of values"),
        ({"path": "seed", "choice": [-1]}, "seed: must be at least 0, got -1"),
        ({"path": "seed", "uniform": [0, 9]}, "whole numbers; write randint or choice"),
        ({"path": "seed", "randint": [0, 2.5]}, "lower and an upper bound"),
        ({"path": "seed", "randint": [5, 5]}, "5 is not below 5"),
        ({"path": "train.patience", "randint": [0, 5]}, "must be above 0, got 0"),
        ({"path": "optim.lr", "loguniform": [0, 1]}, "0 is not above 0"),
        ({"path": "optim.lr", "uniform": [1]}, "lower and an upper bound"),
        ({"path": "optim.lr", "uniform": [".1", 1]}, "lower and an upper bound"),
        ({"path": "optim.lr", "choice": ["fast"]}, "expects a number, got 'fast'"),
        ({"path": "seed", "choice": [1], "when": "x"}, "expects a path and its value"),
        ({"path": "data.source", "choice": ["a"]}, "different text"),
        ({"path": "data.separator", "choice": ["a", None]}, "different text"),
        ({"path": "data.test_source", "choice": ["a", None]}, "different text"),
        ({"path": "compute.num_workers", "choice": [1, 2]}, "does not affect training"),
        ({"path": "tune.num_samples", "choice": [1, 2]}, "does not affect training"),
        ({"path": "train.eval_interval", "choice": [5]}, "compared at the same steps"),
    ],
)
def test_wrong_entry_is_one_problem(entry: dict[str, Any], words: str) -> None:
    (problem,) = problems_of([SOUND[0], entry])
    assert problem.startswith("tune.space, entry 2: ")
    assert words in problem


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"path": "model.dropout", "choice": [0.1]}, "already has an entry (number 1)"),
        ({"path": "seed", "choice": [1], "when": {"model.dropout": 0.4}}, "is never 0.4 here"),
        ({"path": "seed", "grid": [1], "when": {"model.dropout": 0.1}}, "can depend only on grids"),
    ],
)
def test_entry_that_does_not_fit_the_one_before(entry: dict[str, Any], words: str) -> None:
    (problem,) = problems_of([SOUND[0], entry])
    assert words in problem


def test_a_sound_space_is_read_and_dumped(tmp_path: Path) -> None:
    config = override(Config(), {"tune.space": SOUND})
    (tmp_path / "sweep.yaml").write_text(dump(config))
    assert load_config(str(tmp_path / "sweep.yaml"), []) == config
    entries = read_space(config.tune.space, Config)
    assert entries[1].options == ((2, 128), (4, 256)) and isinstance(entries[1].options[1][1], int)
    assert entries[2].options == ((64, 64), (128, 128))
    assert entries[5] == Entry(
        ("optim.warmup_steps",), "choice", ((10,),), when={"optim.schedule": ["step", "cosine"]}
    )


def test_a_space_on_the_command_line() -> None:
    config = load_config(None, ["tune.space=[{path: optim.lr, loguniform: [1e-4, 1e-3]}]"])
    assert config.tune.space == [{"path": "optim.lr", "loguniform": [1e-4, 1e-3]}]
    with pytest.raises(ConfigError, match="entry 1: unknown path"):
        load_config(None, ["tune.space=[{path: lr, choice: [1]}]"])
    with pytest.raises(ConfigError, match="expects a list of entries, got 3"):
        load_config(None, ["tune.space=3"])


def test_optuna_refuses_a_grid() -> None:
    with pytest.raises(ConfigError, match="write choice instead of grid"):
        override(Config(), {"tune.space": SOUND, "tune.search_alg": "optuna"})


def test_ranges_keep_their_ends() -> None:
    randint = Entry(("seed",), "randint", low=3, high=7)
    assert [randint.at(place)["seed"] for place in (0, 0.26, 1 - 1e-16)] == [3, 4, 6]
    logarithmic = Entry(("optim.lr",), "loguniform", low=1e-4, high=1.23456e-2)
    assert logarithmic.at(0.0) == {"optim.lr": 1e-4}
    assert logarithmic.at(1 - 1e-16) == {"optim.lr": pytest.approx(1.23456e-2, rel=1e-3)}
    assert logarithmic.at(0.5) == {"optim.lr": pytest.approx(1.111e-3)}
