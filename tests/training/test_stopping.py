"""Early stopping: what counts as better, and a state that survives being stored."""

from __future__ import annotations

from pathlib import Path

from gptray.training.landing import Landing
from gptray.training.stopping import EarlyStopping
from gptray.training.trainer_state import TrainerState


def after(losses: list[float], *, min_delta: float = 0.0) -> EarlyStopping:
    progress = EarlyStopping()
    for number, loss in enumerate(losses, start=1):
        progress = progress.after(number * 10, loss, min_delta=min_delta)
    return progress


def test_falling_loss_never_exhausts_patience() -> None:
    assert not after([3.0, 2.0, 1.0]).exhausted(1)


def test_patience_counts_evaluations_since_the_best() -> None:
    assert not after([3.0, 2.0, 2.1]).exhausted(2)
    assert after([3.0, 2.0, 2.1, 2.2]).exhausted(2)
    assert not after([3.0, 2.0, 2.1, 1.9]).exhausted(2)


def test_no_patience_never_stops() -> None:
    assert not after([1.0] * 100).exhausted(None)


def test_equal_loss_is_not_better() -> None:
    assert after([2.0, 2.0]).exhausted(1)


def test_best_is_kept_though_min_delta_calls_it_no_better() -> None:
    progress = after([2.0, 1.95, 1.92], min_delta=0.1)
    assert (progress.best_step, progress.best_val_loss) == (30, 1.92)
    assert progress.exhausted(2)


def test_small_steps_that_add_up_to_min_delta_are_better() -> None:
    assert not after([2.0, 1.95, 1.9], min_delta=0.1).exhausted(1)


def test_state_survives_json(tmp_path: Path) -> None:
    landing = Landing(start=30, back_to=20, steps=15, reason="patience")
    for state in (
        TrainerState(0, EarlyStopping(), "d"),
        TrainerState(40, after([3.0, 2.0, 2.1]), "d", 30, (0.1, 1e-7), landing),
    ):
        (tmp_path / "trainer.json").write_text(state.to_json())
        assert TrainerState.load(tmp_path) == state
