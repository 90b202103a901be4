"""What settings were worth: planted effects are found and no others claimed, also under ASHA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gptray.tuning.effects import Effect, Effects, effects_of
from gptray.tuning.levels import Space, settings_of
from gptray.tuning.sweep_record import load_sweep
from tests.tuning.sweeps import Made, Values, cut, sweep_config, trained, write_sweep

CHOICES: list[dict[str, Any]] = [
    {"path": "model.residual", "choice": [True, False]},
    {"path": "model.norm", "choice": ["layernorm", "none"]},
    {"path": "optim.schedule", "choice": ["cosine", "constant", "step"]},
    {"path": "optim.weight_decay", "loguniform": [0.01, 1.0]},
]


def worth(values: Values) -> tuple[float, float]:
    """Without residuals the loss is 0.2 higher; without norms the gap is 0.3 wider."""
    return 0.2 * (not values["model.residual"]), 0.3 * (values["model.norm"] == "none")


def effects(
    folder: Path,
    *changes: str,
    space: Sequence[dict[str, Any]] = CHOICES,
    edit: Callable[[list[Made]], list[Made]] = lambda trials: trials,
    asha: bool = False,
    **how: Any,
) -> Effects:
    """The effects of a made sweep: `worth` is planted unless something else is."""
    config = sweep_config(space, *changes)
    made = edit(trained(config, how.pop("worth", worth), **how))
    write_sweep(folder, config, cut(config, made) if asha else made)
    sweep = load_sweep(folder)
    first = [trial for trial in sweep.trials if not trial.replicate_of]
    return effects_of(sweep, settings_of(Space(config), first))


def one(found: Effects, name: str, level: str) -> Effect:
    (effect,) = [
        effect
        for effect in found.of
        if effect.setting.name == name and effect.setting.levels[effect.level] == level
    ]
    return effect


def claims(found: Effects) -> set[tuple[str, str]]:
    """(setting, outcome) of all that is told from no effect."""
    return {
        (effect.setting.name, outcome)
        for effect in found.of
        if effect.last
        for outcome in ("loss", "gap")
        if getattr(effect.last, outcome).excludes_zero
    }


@pytest.mark.parametrize("trials", [16, 40])
def test_planted_effects_are_found_and_no_others_claimed(tmp_path: Path, trials: int) -> None:
    found = effects(tmp_path, f"tune.num_samples={trials}")
    assert found.steps == (20, 60, 120) and found.reached == (trials, trials, trials)
    loss = one(found, "model.residual", "false").last
    gap = one(found, "model.norm", "none").last
    assert loss and gap and loss.step == gap.step == 120
    assert 0 < loss.loss.low <= 0.2 <= loss.loss.high
    assert 0 < gap.gap.low <= 0.3 <= gap.gap.high
    assert claims(found) == {("model.residual", "loss"), ("model.norm", "gap")}


def test_nothing_is_claimed_where_nothing_was_planted(tmp_path: Path) -> None:
    for seed in range(4):
        folder = tmp_path / str(seed)
        found = effects(folder, "tune.num_samples=20", worth=lambda values: (0.0, 0.0), seed=seed)
        assert claims(found) == set()
        assert all(effect.last for effect in found.of)


def test_a_range_is_compared_in_parts_with_the_part_of_the_config(tmp_path: Path) -> None:
    space = [*CHOICES, {"path": "model.dropout", "uniform": [0.0, 0.3]}]
    found = effects(
        tmp_path,
        "tune.num_samples=24",
        space=space,
        worth=lambda values: (-0.5 * values["model.dropout"], 0.0),
    )
    dropout = [effect for effect in found.of if effect.setting.name == "model.dropout"]
    low, _, high = dropout[0].setting.levels
    assert dropout[0].setting.reference == 0  # the config's own 0
    assert [effect.trials for effect in dropout] == [8, 8]
    assert float(low.split(" to ")[1]) < 0.1 < float(high.split(" to ")[0])
    worths = [effect.last.loss for effect in dropout if effect.last]
    assert worths[0].low <= -0.05 <= worths[0].high and worths[1].low <= -0.1 <= worths[1].high
    assert worths[1].high < 0 and worths[1].middle < worths[0].middle


def test_stopped_trials_do_not_turn_an_effect_around(tmp_path: Path) -> None:
    """Constant rates start worse, so most such trials are stopped, and end better."""
    for seed in (0, 4, 8):
        found = effects(
            tmp_path / str(seed),
            "tune.num_samples=48",
            worth=lambda values: (0.02 * (values["optim.schedule"] == "constant"), 0.0),
            late=lambda values: -0.32 * (values["optim.schedule"] == "constant"),
            noise=0.03,
            seed=seed,
            asha=True,
        )
        effect = one(found, "optim.schedule", "constant")
        assert effect.first and effect.last and effect.last.step == 120
        assert found.reached[-1] < 24
        assert effect.first.loss.middle > 0  # and at the first rung that is the truth
        assert effect.last.loss.low <= -0.3 <= effect.last.loss.high < 0


def test_a_level_that_was_stopped_altogether_is_compared_where_it_was(tmp_path: Path) -> None:
    found = effects(tmp_path, "tune.num_samples=40", asha=True)
    effect = one(found, "model.residual", "false")
    assert effect.last and effect.last.step == 20 and effect.first == effect.last
    assert effect.last.loss.low <= 0.2 <= effect.last.loss.high
    others = one(found, "optim.schedule", "step").last
    assert others and others.step > 20


def test_a_loss_that_rises_again_counts_at_its_lowest(tmp_path: Path) -> None:
    found = effects(
        tmp_path,
        "tune.num_samples=16",
        worth=lambda values: (0.0, 0.0),
        late=lambda values: 0.6 * (not values["model.residual"]),
    )
    last = one(found, "model.residual", "false").last
    assert last and last.loss.high < 0.1


def test_a_trial_gone_astray_hides_no_effect(tmp_path: Path) -> None:
    def astray(trials: list[Made]) -> list[Made]:
        trials[3].curve = [(bits + 6.0, gap) for bits, gap in trials[3].curve]
        return trials

    found = effects(tmp_path, "tune.num_samples=20", edit=astray)
    last = one(found, "model.residual", "false").last
    assert last and 0 < last.loss.low <= 0.2 <= last.loss.high


def test_trials_gone_wrong_and_repetitions_are_left_out(tmp_path: Path) -> None:
    def with_others(trials: list[Made]) -> list[Made]:
        values = {"model.residual": True, "model.norm": "none"}
        other = {"optim.schedule": "step", "optim.weight_decay": 0.1}
        bad = [(9.0, 3.0)] * 12
        return [
            *trials,
            Made("0090", {**values, **other}, bad, "diverged"),
            Made("0091", {**values, **other}, bad, "failed"),
            Made("0092", {**values, **other, "seed": 5}, bad, replicate_of="0001"),
        ]

    plain = effects(tmp_path / "plain", "tune.num_samples=16")
    more = effects(tmp_path / "more", "tune.num_samples=16", edit=with_others)
    assert more.reached == plain.reached
    for effect, other in zip(more.of, plain.of, strict=True):
        if effect.setting.name != "optim.weight_decay":  # whose parts hold one trial more
            assert effect.trials == other.trials
    assert claims(more) == claims(plain)


def test_too_few_trials_are_said_to_be_too_few(tmp_path: Path) -> None:
    found = effects(tmp_path / "few", "tune.num_samples=7")
    assert found.of and all(effect.last is None for effect in found.of)

    def rare(trials: list[Made]) -> list[Made]:
        return [trial for trial in trials if trial.values["model.residual"]] + [
            trial for trial in trials if not trial.values["model.residual"]
        ][:2]

    found = effects(tmp_path / "rare", "tune.num_samples=24", edit=rare)
    effect = one(found, "model.residual", "false")
    assert (effect.trials, effect.against, effect.last) == (2, 12, None)
    assert one(found, "model.norm", "none").last


def test_a_setting_with_a_condition_is_compared_where_it_counts(tmp_path: Path) -> None:
    conditional = {
        "path": "optim.step_size",
        "choice": [500, 100],
        "when": {"optim.schedule": "step"},
    }
    found = effects(
        tmp_path,
        "tune.num_samples=48",
        space=[*CHOICES, conditional],
        worth=lambda values: (0.15 * (values.get("optim.step_size") == 100), 0.0),
    )
    effect = one(found, "optim.step_size", "100")
    assert effect.trials == effect.against == 8
    assert effect.last and 0 < effect.last.loss.low <= 0.15 <= effect.last.loss.high


def test_tied_paths_are_one_setting_and_the_baseline_is_one_of_its_trials(tmp_path: Path) -> None:
    space: list[dict[str, Any]] = [
        {"paths": ["model.n_embd", "model.n_inner"], "choice": [[128, 512], [256, None]]},
        {"path": "data.split", "choice": ["90:10", "80:10:10"]},
        {"path": "optim.max_grad_norm", "uniform": [0.1, 2.0]},
        {"path": "optim.step_size", "choice": [100], "when": {"data.split": "80:10:10"}},
    ]
    config = sweep_config(space, "tune.num_samples=8", "optim.max_grad_norm=null")
    made = trained(config, lambda values: (0.0, 0.0))
    write_sweep(tmp_path, config, [Made("0099", {}, made[0].curve), *made])
    settings = settings_of(Space(config), load_sweep(tmp_path).trials)
    size, split, clip, step = settings
    assert size.name == "model.n_embd, model.n_inner"
    assert size.levels == ("128, 512", "256, null") and size.reference == 1
    assert split.levels == ("90:10", "80:10:10") and split.reference == 0
    assert (size.of["0099"], split.of["0099"]) == (1, 0)
    assert len(clip.levels) == 3 and clip.levels[clip.of["0099"]] == "null"
    assert clip.reference == 0  # only one trial has the config's null
    assert "0099" not in step.of and len(step.of) == 4


def test_a_level_is_compared_with_the_most_frequent_where_the_own_one_is_rare(
    tmp_path: Path,
) -> None:
    """Options given twice are one level; nobody but the baseline has the config's own value."""
    space = [{"path": "model.dropout", "choice": [0.1, 0.2, 0.2]}]
    config = sweep_config(space, "tune.num_samples=12", "model.dropout=0")
    made = trained(config, lambda values: (0.0, 0.0))
    write_sweep(tmp_path, config, [Made("0099", {}, made[0].curve), *made])
    (setting,) = settings_of(Space(config), load_sweep(tmp_path).trials)
    assert setting.levels == ("0.1", "0.2", "0") and setting.reference == 1
    assert sorted(setting.of.values()) == [0] * 4 + [1] * 8 + [2]


def test_trials_that_ended_early_count_at_later_steps_and_running_ones_do_not(
    tmp_path: Path,
) -> None:
    def ended(trials: list[Made]) -> list[Made]:
        for trial in trials[:4]:
            trial.curve, trial.outcome = trial.curve[:8], "patience"
        for trial in trials[4:7]:
            trial.curve, trial.outcome = trial.curve[:4], None
        trials[7].curve, trials[7].outcome = [], None
        return trials

    found = effects(tmp_path, "tune.num_samples=20", edit=ended)
    assert found.reached == (19, 16, 16)


def test_the_same_record_gives_the_same_numbers(tmp_path: Path) -> None:
    first = effects(tmp_path / "1", "tune.num_samples=16", asha=True)
    assert effects(tmp_path / "2", "tune.num_samples=16", asha=True) == first
