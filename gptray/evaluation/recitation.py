"""Verbatim memorisation: which n-grams of generated tokens occur in a split.

The split may be far larger than memory: it is read in ranges, by any worker in any order, and
compared by 64-bit rolling hashes (Karp and Rabin 1987).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gptray.data.tokens import TokenSplit

# The lengths n of the n-grams.
LENGTHS = (20, 50)
# Tokens of a continuation that are checked, and at most of the training text that prompts it.
RECITED_TOKENS, PROMPT_TOKENS = 96, 32
READ_TOKENS = 1 << 20
_BASE = 0x9E3779B97F4A7C15
# A prefilter on the lowest bits, which almost no unwanted hash passes.
_SIEVE = np.uint64((1 << 20) - 1)

Hashes = NDArray[np.uint64]


def ngram_hashes(tokens: NDArray[np.int64], n: int) -> Hashes:
    """The hash of every n-gram, (len(tokens) - n + 1,); empty if there are fewer than n tokens.

    Computed by doubling: the hashes of a tokens and of the next b give that of all a + b.
    """
    count = len(tokens) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    step = _mixed(tokens)
    whole, length, covered = np.zeros(count, np.uint64), 1, 0
    while True:
        if n & length:
            whole = whole * _power(length) + step[covered : covered + count]
            covered += length
        if covered == n:
            return whole
        step = step[:-length] * _power(length) + step[length:]
        length *= 2


def found_in(
    split: TokenSplit, start: int, stop: int, wanted: Sequence[Hashes]
) -> list[NDArray[np.bool_]]:
    """For each of LENGTHS, which wanted hashes begin within tokens [start, stop) of the split."""
    found = [np.zeros(len(hashes), np.bool_) for hashes in wanted]
    sieves = [_sieve(hashes) for hashes in wanted]
    for first in range(start, stop, READ_TOKENS):
        last = min(first + READ_TOKENS, stop)
        tokens = split.slice(first, min(last + max(LENGTHS) - 1, len(split)))
        for n, hashes, sieve, seen in zip(LENGTHS, wanted, sieves, found, strict=True):
            there = ngram_hashes(tokens, n)[: last - first]
            seen |= np.isin(hashes, there[sieve[there & _SIEVE]])
    return found


def _sieve(hashes: Hashes) -> NDArray[np.bool_]:
    sieve = np.zeros(int(_SIEVE) + 1, np.bool_)
    sieve[hashes & _SIEVE] = True
    return sieve


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(_BASE, exponent, 1 << 64))


def _mixed(tokens: NDArray[np.int64]) -> Hashes:
    """Tokens mixed into uniform 64-bit numbers (the finaliser of SplitMix64)."""
    x = tokens.astype(np.uint64) + np.uint64(1)
    x *= np.uint64(_BASE)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
