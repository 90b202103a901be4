"""Random tokens in training: so many, evenly drawn, the same ones whatever the micro-batches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gptray.data.order import replace_tokens

VOCABULARY = 50


def noisy(rows: int, *, step: int = 3, first: int = 0, seed: int = 1) -> NDArray[np.int64]:
    inputs = np.full((rows, 400), VOCABULARY, np.int64)  # a token that is never drawn
    replace_tokens(inputs, 0.1, VOCABULARY, seed=seed, step=step, first=first)
    return inputs


def test_the_share_is_replaced_by_tokens_of_the_whole_vocabulary() -> None:
    inputs = noisy(100)
    drawn = inputs[inputs < VOCABULARY]
    # 40,000 tokens: within five standard deviations.
    assert abs(len(drawn) / inputs.size - 0.1) < 5 * (0.1 * 0.9 / inputs.size) ** 0.5
    counts = np.bincount(drawn, minlength=VOCABULARY)
    assert len(counts) == VOCABULARY
    expected = len(drawn) / VOCABULARY
    assert ((counts - expected) ** 2 / expected).sum() < 86  # chi-square, 49 degrees: p = 0.001


def test_a_row_gets_the_same_in_any_micro_batch() -> None:
    whole = noisy(8)
    parts = [noisy(3), noisy(1, first=3), noisy(4, first=4)]
    assert (np.concatenate(parts) == whole).all()


def test_rows_steps_and_seeds_differ() -> None:
    rows = [*noisy(2), *noisy(1, step=4), *noisy(1, seed=2)]
    assert len({row.tobytes() for row in rows}) == 4
