"""Draws each trial's values from a sweep's search space, as a function of the seed.

All points of the grid are visited. The other entries are drawn by Latin hypercube sampling (McKay
et al. 1979): each of n trials has its own n-th of every distribution, so that few trials cover it.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from gptray.config import UserError
from gptray.config.limits import MAX_TRIALS
from gptray.config.search_space import Entry

Values = dict[str, object]


def draw(entries: Sequence[Entry], num_samples: int, *, seed: int, after: int = 0) -> list[Values]:
    """The values of `num_samples` trials for each point of the grid, the same for the same seed.

    An entry whose condition does not hold is missing from a trial's values.
    after: how many samples were drawn before; the new ones are another Latin hypercube.
    Raises UserError if they are more than MAX_TRIALS in all.
    """
    points = grid_points([entry for entry in entries if entry.kind == "grid"])
    samples = after + num_samples
    if (number := samples * len(points)) > MAX_TRIALS:
        raise UserError(
            f"tune.num_samples={samples} draws {number:,} trials, because the grid of tune.space "
            f"has {len(points):,} points; a sweep has {MAX_TRIALS:,} trials at most"
        )
    trials = [dict(point) for _ in range(num_samples) for point in points]
    for entry in entries:
        if entry.kind == "grid":
            continue
        # Each entry has its own generator, so adding an entry does not change the others' values.
        key = [seed, zlib.crc32(entry.paths[0].encode())]
        rng = np.random.default_rng([*key, after] if after else key)
        drawn = [values for values in trials if entry.is_active(values)]
        for values, stratum in zip(drawn, rng.permutation(len(drawn)), strict=True):
            values |= entry.at((int(stratum) + rng.random()) / len(drawn))
    paths = [path for entry in entries for path in entry.paths]
    return [{path: values[path] for path in paths if path in values} for values in trials]


def grid_points(entries: Sequence[Entry]) -> list[Values]:
    """Every combination of the options; the last entry's change fastest.

    Raises UserError if they are more than MAX_TRIALS.
    """
    points: list[Values] = [{}]
    for entry in entries:
        options = [dict(zip(entry.paths, option, strict=True)) for option in entry.options]
        points = few(
            point | option
            for point in points
            for option in (options if entry.is_active(point) else [{}])
        )
    return points


def few(points: Iterable[Values]) -> list[Values]:
    """The points as a list. Raises UserError if they are more than MAX_TRIALS."""
    found = list(itertools.islice(points, MAX_TRIALS + 1))
    if len(found) > MAX_TRIALS:
        raise UserError(
            f"tune.space has more than {MAX_TRIALS:,} combinations, and all of them would be run; "
            "give fewer values, or write choice instead of grid to draw some of them"
        )
    return found
