"""Batch order: a pure function of (seed, step) that reads the text evenly."""

from __future__ import annotations

import numpy as np
import pytest

from gptray.data.order import BatchOrder


def windows(order: BatchOrder, batch_size: int, steps: range) -> list[int]:
    return [int(start) for step in steps for start in order.batch(step, batch_size)]


def test_batch_is_the_same_in_any_order_of_asking() -> None:
    one, other = BatchOrder(10_000, 32, seed=3), BatchOrder(10_000, 32, seed=3)
    forward = [one.batch(step, 8).tolist() for step in range(100)]
    backward = [other.batch(step, 8).tolist() for step in reversed(range(100))]
    assert forward == backward[::-1]


def test_batches_of_another_size_read_the_same_windows_in_the_same_order() -> None:
    order = BatchOrder(10_000, 32, seed=3)
    assert windows(order, 8, range(100)) == windows(order, 4, range(200))


def test_epoch_starts_one_window_in_each_stretch_of_the_text() -> None:
    order = BatchOrder(10_000, 32, seed=3)
    starts = np.sort(windows(order, 1, range(order.windows_per_epoch)))
    assert (starts // 32).tolist() == list(range(order.windows_per_epoch))
    assert 10_000 - (starts[-1] + 33) < 3 * 32
    assert set((starts % 32).tolist()) == set(range(32))


def test_epochs_differ_in_order_and_in_where_windows_start() -> None:
    order = BatchOrder(10_000, 32, seed=3)
    n = order.windows_per_epoch
    first, second = windows(order, 1, range(n)), windows(order, 1, range(n, 2 * n))
    assert sorted(first) != sorted(second)
    assert first != second


def test_seed_changes_the_order() -> None:
    a, b = BatchOrder(10_000, 32, seed=3), BatchOrder(10_000, 32, seed=4)
    assert a.batch(0, 8).tolist() != b.batch(0, 8).tolist()


@pytest.mark.parametrize("num_tokens", [33, 34, 63, 64, 65, 66, 97, 98])
def test_windows_stay_inside_a_short_text(num_tokens: int) -> None:
    order = BatchOrder(num_tokens, 32, seed=0)
    starts = windows(order, 2, range(50))
    assert min(starts) >= 0
    assert max(starts) + 33 <= num_tokens


def test_text_shorter_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="32 tokens, fewer than block_size \\+ 1 = 33"):
        BatchOrder(32, 32, seed=0)


def test_epoch_counts_windows_not_steps() -> None:
    order = BatchOrder(33 * 32 + 1, 32, seed=0)
    assert order.windows_per_epoch == 32
    assert order.epoch(8, 8) == 2.0
