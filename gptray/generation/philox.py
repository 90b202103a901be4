"""Counter-based random numbers (Philox), so that no row depends on another's draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The constants of Philox4x32-10; the keys grow by WEYL.
ROUNDS = 10
MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)

_32, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_PHILOX_M = tuple(np.uint64(number) for number in MULTIPLIERS)
_PHILOX_W = tuple(np.uint64(number) for number in WEYL)


def uniform(seeds: Sequence[int], samples: Sequence[int], positions: Sequence[int]) -> Tensor:
    """A number in [0, 1) with 53 random bits for each (seed, sample, position), (N,) fp64.

    The same on every machine. Philox4x32-10: Salmon et al. 2011, Parallel Random Numbers: As Easy
    as 1, 2, 3.
    """
    seed = np.asarray(seeds, dtype=np.uint64)
    key = [seed & _LOW, seed >> _32]
    place = [np.asarray(values, dtype=np.uint64) for values in (positions, samples)]
    counter = [place[0] & _LOW, place[0] >> _32, place[1] & _LOW, place[1] >> _32]
    for _ in range(ROUNDS):
        first, second = counter[0] * _PHILOX_M[0], counter[2] * _PHILOX_M[1]
        counter = [
            (second >> _32) ^ counter[1] ^ key[0],
            second & _LOW,
            (first >> _32) ^ counter[3] ^ key[1],
            first & _LOW,
        ]
        key = [(k + w) & _LOW for k, w in zip(key, _PHILOX_W, strict=True)]
    bits: NDArray[np.uint64] = (counter[0] << _32 | counter[1]) >> np.uint64(11)
    return torch.from_numpy(bits.astype(np.float64) * 2.0**-53)
