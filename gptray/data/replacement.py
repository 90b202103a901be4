"""Noise in the input: random tokens in the place of some, so that no text is learned by heart.

Xie et al. 2017, Data Noising as Smoothing in Neural Network Language Models.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def replace_tokens(
    inputs: NDArray[np.int64], share: float, vocab_size: int, *, seed: int, step: int, first: int
) -> None:
    """Replace that share of the inputs (B, T), in place, by any tokens of the vocabulary.

    The rows are `first`, `first + 1`, ... of the step's global batch. What a row gets is a function
    of (seed, step, its number), whatever the micro-batches and the workers.
    """
    for number, row in enumerate(inputs, start=first):
        # A counter for each row: one generator's state would depend on the rows before.
        bits = np.random.Philox(key=seed, counter=[0, 0, number, step])
        drawn = np.random.Generator(bits).random(row.size)
        chosen = drawn < share
        row[chosen] = (drawn[chosen] / share * vocab_size).astype(np.int64)
