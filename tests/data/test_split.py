from __future__ import annotations

import numpy as np
import pytest

from gptray.config import UserError
from gptray.data.split import TEST, TRAIN, UNUSED, VAL, Assignment, assign

SIZES = np.random.default_rng(0).integers(1, 500, size=1000)


def assigned(
    sizes: object, split: tuple[float, ...], *, fraction: float = 1.0, seed: int = 3
) -> Assignment:
    """Of documents with a byte per character."""
    counts = np.array(sizes)
    return assign(counts, counts, dict(enumerate(split)), fraction=fraction, seed=seed)


def text_of(found: Assignment, sizes: object, label: int) -> set[tuple[int, int]]:
    """(document, character) of everything that has a label."""
    out = set()
    for document, size in enumerate(np.array(sizes).tolist()):
        start = 0
        regions = found.cut.get(document, ((size, int(found.labels[document])),))
        assert regions[-1][0] == size
        for stop, name in regions:
            assert stop > start or size == 0
            if name == label:
                out |= {(document, at) for at in range(start, stop)}
            start = stop
    return out


def shares(found: Assignment, sizes: object) -> list[float]:
    """The part of all characters that each of train, val and test has."""
    counts = np.array(sizes)
    totals = [0, 0, 0]
    for document, size in enumerate(counts.tolist()):
        start = 0
        for stop, label in found.cut.get(document, ((size, int(found.labels[document])),)):
            totals[label] += stop - start
            start = stop
    return [total / counts.sum() for total in totals]


BOOK = 23_346
CORPORA = {
    "book and README": [BOOK, 724],
    "train.txt and val.txt": [1_003_854, 111_540],
    "2 books": [400_000, 650_000],
    "3 books": [400_000, 650_000, 90_000],
    "5 books": [400_000, 650_000, 90_000, 1_200_000, 310_000],
    "20 books": np.random.default_rng(1).integers(50_000, 900_000, 20).tolist(),
    "one giant and 99 small files": [90_000_000, *[1_500] * 99],
    "one giant and 99 middling files": [9_000_000, *[90_000] * 99],
}


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("split", [(0.9, 0.1), (0.8, 0.1, 0.1), (0.98, 0.01, 0.01), (0.5, 0.5)])
def test_shares_of_text_are_those_asked_for(name: str, split: tuple[float, ...]) -> None:
    for seed in range(200):
        found = shares(assigned(CORPORA[name], split, seed=seed), CORPORA[name])
        for got, asked in zip(found, split, strict=False):
            assert abs(got - asked) <= 0.02
            assert abs(got - asked) <= 0.2 * asked


@pytest.mark.parametrize("split", [(0.9, 0.1), (0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.34, 0.66)])
def test_many_documents_stay_whole(split: tuple[float, ...]) -> None:
    found = assigned(SIZES, split)
    assert not found.cut
    got = [SIZES[found.labels == label].sum() / SIZES.sum() for label in range(len(split))]
    assert got == pytest.approx(split, abs=0.002)


def test_border_falls_on_an_edge_that_is_near_and_on_no_other() -> None:
    for seed in range(20):
        assert not assigned([505, 495], (0.5, 0.5), seed=seed).cut
        assert len(assigned([530, 470], (0.5, 0.5), seed=seed).cut) == 1


def test_assignment_is_a_function_of_the_seed() -> None:
    first, again, other = (assigned(SIZES, (0.9, 0.1), seed=seed) for seed in (1, 1, 2))
    assert first.labels.tolist() == again.labels.tolist() != other.labels.tolist()


@pytest.mark.parametrize("sizes", [SIZES, [700, 20, 280], [5000], [9000, *[15] * 99]])
def test_fractions_are_nested_and_leave_the_rest_alone(sizes: object) -> None:
    split = (0.8, 0.1, 0.1)
    full = assigned(sizes, split, seed=5)
    whole = text_of(full, sizes, TRAIN)
    smaller: set[tuple[int, int]] = set()
    for fraction in (0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        found = assigned(sizes, split, fraction=fraction, seed=5)
        train = text_of(found, sizes, TRAIN)
        assert smaller <= train <= whole
        assert train
        assert text_of(found, sizes, UNUSED) == whole - train
        assert text_of(found, sizes, VAL) == text_of(full, sizes, VAL)
        assert text_of(found, sizes, TEST) == text_of(full, sizes, TEST)
        assert len(train) / len(whole) == pytest.approx(fraction, rel=0.15, abs=2 / len(whole))
        smaller = train


def test_no_split_stays_empty() -> None:
    for sizes in ([10_000, 1, 1], [1, 1, 10_000], [0, 0, 500, 500], [3] * 100):
        for seed in range(20):
            found = assigned(sizes, (0.98, 0.01, 0.01), fraction=0.001, seed=seed)
            assert all(text_of(found, sizes, label) for label in (TRAIN, VAL, TEST))
            assert all(found.documents(label) for label in (TRAIN, VAL, TEST))


def test_a_document_that_is_cut_counts_in_each_of_its_splits() -> None:
    found = assigned([1000], (0.8, 0.1, 0.1), fraction=0.5)
    assert found.cut == {0: ((400, TRAIN), (800, UNUSED), (900, TEST), (1000, VAL))}
    assert [found.documents(label) for label in (TRAIN, VAL, TEST)] == [1, 1, 1]


def test_too_little_text_for_so_many_splits_is_a_mistake() -> None:
    with pytest.raises(UserError, match="3 parts but the source has only 8 characters;"):
        assigned([5, 3], (0.8, 0.1, 0.1))


@pytest.mark.parametrize("characters", [10, 999, 1_115_394])
def test_position_cut_is_nanogpts(characters: int) -> None:
    found = assigned([characters], (0.9, 0.1))
    assert found.cut == {0: ((int(characters * 0.9), TRAIN), (characters, VAL))}


@pytest.mark.parametrize("share", [0.1, 0.05, 0.3])
@pytest.mark.parametrize("sizes", [SIZES, [99_991], [700, 5000, 300], [90_000, *[15] * 99]])
def test_validation_text_depends_on_its_own_share_alone(share: float, sizes: object) -> None:
    splits = [(1 - share, share), *((1 - share - test, share, test) for test in (0.1, 0.2, 0.07))]
    fractions = [1.0, 0.5, 0.01, 1.0]
    found = [
        text_of(assigned(sizes, split, fraction=fraction), sizes, VAL)
        for split, fraction in zip(splits, fractions, strict=True)
    ]
    assert all(text == found[0] for text in found)


def test_borders_count_bytes_where_characters_differ_in_size() -> None:
    """A Korean book next to an English one: three bytes a character."""
    for seed in range(20):
        shares = {TRAIN: 0.8, VAL: 0.1, TEST: 0.1}
        found = assign(np.array([3000, 3000]), np.array([1000, 3000]), shares, seed=seed)
        sizes = {0: 3, 1: 1}  # bytes of a character
        for label, share in shares.items():
            text = text_of(found, [1000, 3000], label)
            assert sum(sizes[document] for document, _ in text) == pytest.approx(
                share * 6000, abs=6
            )
