from __future__ import annotations

import numpy as np
import pytest

from gptray.config import UserError
from gptray.data.split import UNUSED, assign_documents, assign_positions

SIZES = np.random.default_rng(0).integers(1, 500, size=1000)


@pytest.mark.parametrize("split", [(0.9, 0.1), (0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.34, 0.66)])
def test_shares_hold_in_bytes(split: tuple[float, ...]) -> None:
    labels = assign_documents(SIZES, split, fraction=1.0, seed=3)
    shares = [SIZES[labels == label].sum() / SIZES.sum() for label in range(len(split))]
    assert shares == pytest.approx(split, abs=0.002)
    assert set(labels) == set(range(len(split)))


def test_assignment_is_a_function_of_the_seed() -> None:
    first, again, other = (
        assign_documents(SIZES, (0.9, 0.1), fraction=1.0, seed=seed).tolist() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_fractions_are_nested_and_leave_the_rest_alone() -> None:
    full = assign_documents(SIZES, (0.8, 0.1, 0.1), fraction=1.0, seed=5)
    smaller: set[int] = set()
    for fraction in (0.001, 0.1, 0.25, 0.5, 0.9):
        labels = assign_documents(SIZES, (0.8, 0.1, 0.1), fraction=fraction, seed=5)
        train = set(np.flatnonzero(labels == 0).tolist())
        assert smaller < train < set(np.flatnonzero(full == 0).tolist())
        assert np.array_equal(labels[full != 0], full[full != 0])
        assert set(labels[full == 0]) == {0, UNUSED}
        share = SIZES[labels == 0].sum() / SIZES[full == 0].sum()
        assert share == pytest.approx(fraction, abs=0.005)
        smaller = train


@pytest.mark.parametrize("sizes", [[1, 1, 1], [10_000, 1, 1], [1, 1, 10_000], [0, 0, 5, 5]])
def test_no_split_stays_empty(sizes: list[int]) -> None:
    for seed in range(20):
        labels = assign_documents(np.array(sizes), (0.98, 0.01, 0.01), fraction=0.01, seed=seed)
        assert {0, 1, 2} <= set(labels.tolist())


def test_fewer_documents_than_splits_is_a_mistake() -> None:
    with pytest.raises(UserError, match="3 parts but the source has only 2 documents"):
        assign_documents(np.array([5, 5]), (0.8, 0.1, 0.1), fraction=1.0, seed=0)


@pytest.mark.parametrize("characters", [10, 999, 1_115_394])
def test_position_cut_is_nanogpts(characters: int) -> None:
    regions = assign_positions(characters, (0.9, 0.1), fraction=1.0)
    assert regions == [(int(characters * 0.9), 0), (characters, 1)]


def test_position_fraction_takes_the_first_part() -> None:
    regions = assign_positions(1000, (0.8, 0.1, 0.1), fraction=0.25)
    assert regions == [(200, 0), (800, UNUSED), (900, 2), (1000, 1)]


@pytest.mark.parametrize("share", [0.1, 0.05, 0.3])
def test_validation_text_depends_on_its_own_share_alone(share: float) -> None:
    splits = [(1 - share, share), *((1 - share - test, share, test) for test in (0.1, 0.2, 0.07))]
    fractions = [1.0, 0.5, 0.01, 1.0]
    labels = [
        assign_documents(SIZES, split, fraction=fraction, seed=3)
        for split, fraction in zip(splits, fractions, strict=True)
    ]
    assert len({np.flatnonzero(found == 1).tobytes() for found in labels}) == 1
    regions = [
        assign_positions(99_991, split, fraction=fraction)
        for split, fraction in zip(splits, fractions, strict=True)
    ]
    assert {found[-1] for found in regions} == {(99_991, 1)}
    assert {found[-2].stop for found in regions} == {int(99_991 * (1 - share))}


def test_document_too_short_to_cut_is_a_mistake() -> None:
    with pytest.raises(UserError, match="one document of 3 characters, too short"):
        assign_positions(3, (0.9, 0.05, 0.05), fraction=1.0)
