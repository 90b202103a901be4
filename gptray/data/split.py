"""Which document, or which part of the only document, goes to train, val and test.

Pure functions of sizes, fractions and the seed; reading and writing is left to others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gptray.config import UserError

SPLITS = ("train", "val", "test")
LONG_NAMES = {"train": "training", "val": "validation", "test": "test"}
WHOLE = ("test",)  # of a text that is not split
# How splits lie in a text, by number of parts: validation last, so that where it begins depends on
# its own share alone, and 90:10 and 80:10:10 are validated on the same text.
_LAYOUTS = {1: (0,), 2: (0, 1), 3: (0, 2, 1)}
TRAIN = 0
UNUSED = 255  # training text beyond data.fraction
_SPLIT_STREAM = 1  # keeps this permutation apart from every other use of the seed

Labels = npt.NDArray[np.uint8]


def split_names(parts: int) -> tuple[str, ...]:
    """What the parts of a text are called; a text in one part is there to be tested on."""
    return SPLITS[:parts] if parts > 1 else WHOLE


class Region(NamedTuple):
    """Characters of the only document up to `stop` that carry one label (an index of SPLITS)."""

    stop: int
    label: int


def assign_documents(
    sizes: npt.NDArray[np.int64], fractions: Sequence[float], *, fraction: float, seed: int
) -> Labels:
    """Label each document (index of SPLITS, or UNUSED) by its place in a seeded permutation.

    A document belongs where the middle of its bytes falls, so shares hold in bytes; training
    subsets of growing `fraction` are nested and leave validation and test as they are.
    Raises UserError when there are fewer documents than splits.
    """
    count, parts = len(sizes), len(fractions)
    if count < parts:
        raise UserError(
            f"data.split has {parts} parts but the source has only {count} documents; "
            "give fewer parts or more text"
        )
    order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(count)
    ends = np.cumsum(sizes[order])
    middles = ends - sizes[order] / 2
    bounds = [0, *np.searchsorted(middles, [cut * ends[-1] for cut in _cuts(fractions)]), count]
    for i in range(1, parts):  # no split stays empty
        bounds[i] = min(max(bounds[i], bounds[i - 1] + 1), count - (parts - i))
    labels = np.empty(count, dtype=np.uint8)
    for place, label in enumerate(_LAYOUTS[parts]):
        labels[order[bounds[place] : bounds[place + 1]]] = label
    used = np.searchsorted(middles[: bounds[1]], fraction * ends[bounds[1] - 1])
    labels[order[max(int(used), 1) : bounds[1]]] = UNUSED
    return labels


def assign_positions(
    characters: int, fractions: Sequence[float], *, fraction: float
) -> list[Region]:
    """Cut the only document by position, train first, at int(characters * fraction of it).

    Raises UserError when a split would stay empty.
    """
    bounds = [0, *(int(characters * cut) for cut in _cuts(fractions)), characters]
    used = max(int(bounds[1] * fraction), 1)
    if any(start >= stop for start, stop in zip(bounds, bounds[1:], strict=False)):
        raise UserError(
            f"the source is one document of {characters} characters, too short for a split "
            f"in {len(fractions)} parts"
        )
    regions = [Region(used, TRAIN)]
    if used < bounds[1]:
        regions.append(Region(bounds[1], UNUSED))
    rest = zip(bounds[2:], _LAYOUTS[len(fractions)][1:], strict=True)
    return regions + [Region(stop, label) for stop, label in rest]


def _cuts(fractions: Sequence[float]) -> list[float]:
    """Where one split ends and the next begins, as shares of the whole."""
    if len(fractions) == 1:
        return []
    # A lone remainder is not rounded: 1 - 0.1 is 0.9 however the shares before it add up.
    return [*fractions[: len(fractions) - 2], 1 - fractions[1]]
