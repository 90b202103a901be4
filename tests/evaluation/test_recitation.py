"""n-grams that stand in a split: as a search by brute force finds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gptray.evaluation import recitation
from gptray.evaluation.recitation import LENGTHS, found_in, ngram_hashes
from tests.evaluation.splits import split_of


def grams(tokens: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


@pytest.mark.parametrize("read", [64, 1 << 20])
def test_finds_what_a_search_by_brute_force_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: int
) -> None:
    monkeypatch.setattr(recitation, "READ_TOKENS", read)
    rng = np.random.default_rng(4)
    train = rng.integers(0, 500, 1500).tolist()
    # Copied word for word, copied with one token changed, from the very end, and new.
    copied, changed = train[700:800], train[100:170]
    changed[30] = 501
    written = [copied, changed, train[-60:], rng.integers(0, 500, 90).tolist(), [1, 2, 3]]
    wanted = [
        np.concatenate([ngram_hashes(np.array(tokens), n) for tokens in written]) for n in LENGTHS
    ]
    split = split_of(tmp_path, train, shards=3)
    found = [
        np.logical_or.reduce(parts)
        for parts in zip(
            *(
                found_in(split, start, min(start + 400, 1500), wanted)
                for start in range(0, 1500, 400)
            ),
            strict=True,
        )
    ]
    for n, seen in zip(LENGTHS, found, strict=True):
        there = set(grams(train, n))
        expected = [gram in there for tokens in written for gram in grams(tokens, n)]
        assert seen.tolist() == expected
        assert 0 < sum(expected) < len(expected)


@pytest.mark.parametrize("n", [1, 2, 3, 20, 50, 63])
def test_equal_runs_have_equal_hashes_and_others_do_not(n: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 3, 4000)
    hashes = ngram_hashes(tokens, n)
    assert len(hashes) == len(tokens) - n + 1
    different = {tuple(gram) for gram in grams(tokens.tolist(), n)}
    assert len(np.unique(hashes)) == len(different)
    assert len(ngram_hashes(tokens[: n - 1], n)) == 0
