"""What is said of a run: on curves whose story is known, and on noise that has none."""

from __future__ import annotations

import math
import random

import pytest

from gptray.config import override
from gptray.reports.run.advice import advise
from gptray.reports.run.diagnosis import diagnose, turning_point
from gptray.reports.run.sentence import sentence
from gptray.storage.record import Event, seconds_trained
from gptray.wording import count, decimals, size_words, time_words
from tests.reports.curves import Rows, config_of, evaluated, rows_of, started

OVERFIT = [4.0, 3.0, 2.5, 2.2, 2.05, 2.0, 2.01, 2.1, 2.2, 2.3, 2.4, 2.5]
FALLING = [4.0, 3.5, 3.1, 2.8, 2.6, 2.45, 2.35, 2.3]


def noisy(losses: list[float], deviation: float, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [loss + rng.gauss(0, deviation) for loss in losses]


def level(evaluations: int) -> list[float]:
    return [2 + 3 * math.exp(-15 * i / evaluations) for i in range(evaluations)]


def changes(rows: Rows, *overrides: str, parameters: int = 1_000_000) -> list[str]:
    config = config_of(rows, *overrides)
    diagnosis = diagnose(rows, config, [started(parameters=parameters)])
    return [advice.change for advice in advise(diagnosis, config)]


def test_overfitting_is_told_with_its_step_its_cost_and_what_to_try() -> None:
    rows = rows_of(OVERFIT)
    config = config_of(rows)
    diagnosis = diagnose(rows, config)
    assert diagnosis.verdict == "overfitting"
    assert diagnosis.best and diagnosis.turned and diagnosis.last
    assert (diagnosis.best.step, diagnosis.turned.step, diagnosis.last.step) == (60, 70, 120)
    assert diagnosis.last.gap == rows[-1]["gap"] > diagnosis.turned.gap == rows[6]["gap"]
    # 2,048 tokens a step at 2,048 tokens a second: a second a step
    assert sentence(diagnosis, config).startswith(
        "Validation loss was best at step 60 (2.00); the 60 steps after it cost 60 s and made it "
        "0.50 worse. Try: "
    )


def test_hours_count_the_evaluations_and_leave_a_pause_out() -> None:
    rows = rows_of(OVERFIT)
    first = [started()] + [evaluated(10 * i, [], time=1200.0 * i) for i in range(1, 7)]
    night = 100_000.0
    second = [started(60, time=night)]
    second += [evaluated(10 * i, [], time=night + 1200.0 * (i - 6)) for i in range(7, 13)]
    diagnosis = diagnose(rows, config_of(rows), first + second)
    assert diagnosis.seconds(diagnosis.steps_after_best) == pytest.approx(2 * 3600)
    assert "cost 2 h and made it" in sentence(diagnosis, config_of(rows))


def test_a_clock_that_was_set_back_shortens_a_run_by_no_more_than_that_evaluation() -> None:
    times = [0.0, 20.0, 40.0, -3540.0, -3520.0]
    events = [started()] + [evaluated(10 * i, [], time=time) for i, time in enumerate(times)]
    assert seconds_trained(events) == 60.0
    night = [started(40, time=100.0), evaluated(50, [], time=105.0)]
    assert seconds_trained([evaluated(0, []), *events, *night]) == 65.0


def test_pace_knows_that_a_run_was_interrupted() -> None:
    rows = rows_of([4.0, 3.0, 2.5])
    day = [started(), evaluated(10, [], time=50.0), evaluated(20, [], time=90.0)]
    next_day = [started(20, time=90_000.0), evaluated(30, [], time=90_060.0)]
    assert diagnose(rows, config_of(rows), day + next_day).pace == pytest.approx(4.0)


def test_early_stopping_is_told_with_what_it_saved() -> None:
    rows = rows_of(OVERFIT[:10])
    config = config_of(rows, "train.patience=4", "train.max_steps=900")
    diagnosis = diagnose(rows, config)
    assert diagnosis.ended == "patience" and diagnosis.steps_saved == 800
    text = sentence(diagnosis, config)
    assert "best at step 60 (2.00); early stopping ended training 40 steps later" in text
    assert "saved 800 steps (13 min). Try: " in text
    assert "early stopping" not in changes(rows, "train.patience=4")


def test_a_run_that_goes_on_is_told_as_such() -> None:
    rows = rows_of(OVERFIT)
    config = config_of(rows, "train.max_steps=900")
    diagnosis = diagnose(rows, config)
    assert diagnosis.ended is None and diagnosis.steps_saved == 0
    assert sentence(diagnosis, config).startswith("So far validation loss was best at step 60")


def test_event_of_the_end_outweighs_what_the_rows_suggest() -> None:
    rows = rows_of(OVERFIT)
    # min_delta: patience ran out although the last evaluation was a new best.
    config = config_of(rows, "train.max_steps=900", "train.patience=3", "train.min_delta=0.1")
    ended: Event = {"event": "end", "time": 9.0, "stopped": "patience"}
    assert diagnose(rows[:6], config, [started(), ended]).ended == "patience"
    assert diagnose(rows[:6], config, [started(), ended, started(60)]).ended is None


def test_still_falling_asks_for_more_steps() -> None:
    rows = rows_of(FALLING)
    config = config_of(rows)
    diagnosis = diagnose(rows, config)
    assert diagnosis.verdict == "falling" and diagnosis.turned is None
    assert sentence(diagnosis, config) == (
        "Validation loss was still falling at the end: 2.30 at step 80. Try: more steps."
    )


@pytest.mark.parametrize("evaluations", [12, 30, 100])
def test_noise_on_a_level_curve_is_no_turn(evaluations: int) -> None:
    curves = [noisy(level(evaluations), 0.03, seed) for seed in range(200)]
    turns = [curve for curve in curves if turning_point(curve).index is not None]
    assert len(turns) <= 8  # 4 %


@pytest.mark.parametrize("evaluations", [20, 100])
def test_turn_is_found_under_noise_and_near_its_place(evaluations: int) -> None:
    third = evaluations // 3
    rise = [0.4 * max(0, i - third) / (evaluations - third) for i in range(evaluations)]
    curve = [a + b for a, b in zip(level(evaluations), rise, strict=True)]
    for seed in range(50):
        turn = turning_point(noisy(curve, 0.02, seed))
        assert turn.index is not None and third - 3 <= turn.index <= 0.75 * evaluations
        assert 0.005 < turn.noise < 0.06


def test_level_curve_is_told_to_be_in_order() -> None:
    rows = rows_of(noisy(level(40), 0.005, 1), train=noisy(level(40), 0.005, 2))
    config = config_of(rows)
    diagnosis = diagnose(rows, config)
    assert diagnosis.verdict == "level"
    assert "nothing is wrong" in sentence(diagnosis, config)
    # Training loss is no lower, which noise in training would explain.
    assert changes(rows, "model.dropout=0")[0] == "more parameters"
    for noise in ("model.dropout=0.2", "data.token_replacement=0.1"):
        assert changes(rows, "model.dropout=0", noise)[0] == "more data"


def test_curve_that_has_become_level_is_not_called_falling() -> None:
    # Tiny Shakespeare, a twentieth of it: 6 layers of 384, dropout 0.2, as trained.
    losses = [2.700, 2.663, 2.636, 2.646, 2.605, 2.538, 2.468, 2.437, 2.406, 2.413]
    losses += [2.376, 2.379, 2.355, 2.338, 2.354, 2.334, 2.326, 2.323, 2.332, 2.333]
    rows = rows_of(losses)
    assert diagnose(rows, config_of(rows)).verdict == "level"
    assert changes(rows, "data.fraction=0.05")[0] == "all of the text"
    slowly = [2.6 - 0.01 * i for i in range(20)]
    verdicts = [
        diagnose(rows, config_of(rows)).verdict
        for rows in (rows_of(noisy(slowly, 0.006, seed)) for seed in range(50))
    ]
    assert verdicts.count("falling") >= 45


def test_a_curve_that_came_back_has_not_turned() -> None:
    there_and_back = [4.0, 3.0, 2.0, 2.3, 2.6, 2.8, 2.6, 2.3, 2.0, 1.9, 1.8]
    assert turning_point(there_and_back).index is None


def test_two_bad_evaluations_are_no_turn_and_said_to_be_unclear() -> None:
    rows = rows_of(OVERFIT[:6] + [2.3, 2.6])
    config = config_of(rows, "train.patience=2", "train.max_steps=200")
    diagnosis = diagnose(rows, config)
    assert diagnosis.verdict == "unsure" and diagnosis.turned is None
    assert "0.60 higher 2 evaluations later: too few to tell" in sentence(diagnosis, config)
    assert changes(rows, "train.patience=2", "train.max_steps=200")[0] == "more patience"
    assert changes(rows, "train.max_steps=200") == []  # it goes on: time will tell


def test_training_loss_that_rises_along_is_instability_not_overfitting() -> None:
    up = [4.0, 3.0, 2.5, 2.2, 2.0, 3.0, 4.0, 5.0, 6.0]
    rows = rows_of(up, train=[loss - 0.1 for loss in up])
    config = config_of(rows, "optim.max_grad_norm=null")
    diagnosis = diagnose(rows, config)
    assert diagnosis.verdict == "unstable"
    assert "which is not overfitting" in sentence(diagnosis, config)
    advice = [item.change for item in advise(diagnosis, config)]
    assert advice[:2] == ["clipping", "a lower learning rate"]
    lower = advise(diagnosis, override(config, {"optim.lr": 50.0}))[1]
    assert lower.keys["optim.lr"] == 0.003  # a third would diverge too


@pytest.mark.parametrize(
    ("val", "train"), [([3.70, 7.16], [3.03, 4.55]), ([182.9, 697.9], [37.1, 252.2])]
)
def test_training_loss_above_where_it_began_is_instability_however_few_the_evaluations(
    val: list[float], train: list[float]
) -> None:
    rows = rows_of(val, train)
    config = config_of(rows, "optim.lr=5", "train.patience=1", "train.max_steps=900")
    diagnosis = diagnose(rows, config)
    assert (diagnosis.verdict, diagnosis.ended) == ("unstable", "patience")
    assert [one.change for one in advise(diagnosis, config)][:1] == ["a lower learning rate"]


@pytest.mark.parametrize(
    ("val", "train"),
    [
        ([3.372, 3.948, 6.735, 6.260, 6.259, 6.175], [3.681, 3.945, 6.728, 5.806, 5.718, 5.730]),
        ([5.4, 4.9, 4.7, 6.8, 6.5, 6.4, 6.4, 6.35], [5.3, 4.8, 4.6, 6.7, 6.4, 6.4, 6.3, 6.3]),
    ],
)
def test_a_leap_among_few_evaluations_is_not_taken_for_noise(
    val: list[float], train: list[float]
) -> None:
    rows = rows_of(val, train)
    diagnosis = diagnose(rows, config_of(rows))
    assert diagnosis.verdict == "unstable"
    assert diagnosis.turned and diagnosis.turned.val_loss == min(val)


def test_a_model_that_training_made_worse_is_told_what_it_was_before() -> None:
    base: Event = {"event": "base", "time": 0.0, "val_loss": 3.19, "val_bpb": 1.38, "also": {}}
    rows = rows_of([3.372, 3.948, 6.735, 6.260, 6.259, 6.182])
    folder = "model.init_from=gpt2"
    for words, lower in (
        (["lora.rank=8", "optim.lr=0.02"], 1.3e-3),
        (["optim.lr=0.02"], 1.3e-4),
        (["optim.lr=3e-5"], 1e-5),
    ):
        config = config_of(rows, folder, "model.n_embd=768", *words)
        diagnosis = diagnose(rows, config, [started(), base])
        assert diagnosis.verdict == "harmed"
        assert sentence(diagnosis, config).startswith(
            "The model was better before training (3.19): validation loss was 3.37 at best "
            "(step 10) and 6.18 at the end. Try: a lower learning rate"
        )
        assert advise(diagnosis, config)[0].keys["optim.lr"] == lower
    gained = [3.0, *(row["val_loss"] for row in rows)]
    assert diagnose(rows_of(gained), config, [started(), base]).verdict == "overfitting"


def test_a_number_that_was_not_finite_is_told() -> None:
    rows = rows_of(FALLING)
    config = config_of(rows, "train.max_steps=900")
    ended: Event = {"event": "end", "time": 9.0, "stopped": "non_finite"}
    diagnosis = diagnose(rows, config, [started(), ended])
    assert diagnosis.verdict == "unstable"
    assert "training stopped after step 80" in sentence(diagnosis, config)
    assert "not finite" in sentence(diagnose([], config, [started(), ended]), config)


def test_a_model_that_learns_nothing_is_told() -> None:
    rows = rows_of([6.9] * 8, train=[6.92] * 8)
    config = config_of(rows, "optim.lr=1e-9", "optim.min_lr=0")
    diagnosis = diagnose(rows, config)
    assert diagnosis.verdict == "stuck"
    assert "Try: a higher learning rate." in sentence(diagnosis, config)
    assert advise(diagnosis, config)[0].keys == {"optim.lr": 1e-4}
    (usual,) = advise(diagnosis, override(config, {"optim.lr": 1e-3}))
    assert (usual.reason, usual.keys) == ("optim.lr is 0.001", {"optim.lr": 3e-3})
    slow = override(config, {"optim.warmup_steps": 60, "train.max_steps": 60})
    (warmup,) = advise(diagnosis, slow)
    assert warmup.reason == "optim.warmup_steps is 60; the run has 60 steps"


def test_one_evaluation_or_none_is_no_story() -> None:
    one = rows_of([3.0])
    config = config_of(one, "train.max_steps=10")
    assert diagnose(one, config).verdict == "single"
    assert "only one evaluation" in sentence(diagnose(one, config), config)
    for steps, interval, keys in (
        (10, 10, {"train.eval_interval": 3}),
        (6, 100, {"train.eval_interval": 2}),
        (1, 10, {"train.max_steps": 30}),
        (1, 1, {"train.max_steps": 3}),
    ):
        single = rows_of([3.0], every=steps)
        config = config_of(single, f"train.eval_interval={interval}")
        assert [one.keys for one in advise(diagnose(single, config), config)] == [keys]
    none = diagnose([], config)
    assert none.verdict == "none" and none.best is None and none.steps_after_best == 0
    assert sentence(none, config) == "There is no evaluation to judge from yet."


def test_advice_is_ordered_by_what_the_numbers_support() -> None:
    rows = rows_of(OVERFIT)  # half an epoch in 10 steps of 2,048 tokens: 40,960 tokens of text
    plain = changes(rows, "model.dropout=0")
    assert plain[:3] == ["token replacement", "a landing", "dropout"] and "several seeds" in plain
    assert changes(rows, "model.dropout=0.1")[0] == "token replacement"
    landing = ["optim.schedule=wsd", "train.teachers=[a,b]"]
    assert not {"a landing", "several seeds"} & set(changes(rows, *landing))
    tuned = changes(
        rows, "model.dropout=0", "model.init_from=gpt2", "optim.min_lr=1e-5", "optim.lr=1e-5"
    )
    assert not {"token replacement", "several seeds"} & set(tuned)
    noisy = changes(rows, "model.dropout=0", "data.token_replacement=0.1")
    assert not {"token replacement", "dropout", "more dropout"} & set(noisy)
    assert changes(rows, "data.fraction=0.1")[0] == "all of the text"
    assert "weight decay" in changes(rows, "optim.weight_decay=0")
    assert "weight decay" not in changes(rows)
    often = [row | {"epoch": 100 * row["epoch"]} for row in rows]
    assert changes(often, parameters=1_000)[0] == "more data"
    assert "more data" not in changes([row | {"epoch": row["epoch"] / 100} for row in rows])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "less than a second"),
        (1.0, "1 s"),
        (94.0, "94 s"),
        (150.0, "2.5 min"),
        (3000.0, "50 min"),
        (3590.0, "1 h"),
        (7200.0, "2 h"),
        (40 * 3600.0, "40 h"),
        (72 * 3600.0, "3 days"),
    ],
)
def test_times_are_said_in_the_unit_of_their_size(seconds: float, words: str) -> None:
    assert time_words(seconds) == words


def test_counts_have_singular_and_plural_and_small_differences_their_decimals() -> None:
    assert [count(1, "step"), count(3750, "step")] == ["1 step", "3,750 steps"]
    sizes = [size_words(20_000), size_words(999_960), size_words(1_234_500_000)]
    assert sizes == ["20.0 kB", "1.0 MB", "1,234.5 MB"]
    assert [decimals(0.21), decimals(0.0042), decimals(1e-9)] == [2, 3, 5]
    rows = rows_of([*OVERFIT[:6], 2.001], every=1)
    config = config_of(rows)
    text = sentence(diagnose(rows, config), config)
    assert "1 steps" not in text


def test_another_seed_keeps_the_split() -> None:
    rows = rows_of(OVERFIT)
    for overrides, seed, split in (((), 1338, 1337), (("seed=9", "data.seed=5"), 10, 5)):
        config = config_of(rows, *overrides)
        keys = {advice.change: advice.keys for advice in advise(diagnose(rows, config), config)}
        assert keys["several seeds"] == {"seed": seed, "data.seed": split}
