"""The batch order: which windows of the training split a step reads, a function of (seed, step).

It does not depend on workers, micro-batches or restarts, so a resumed run, or one with a different
number of workers, sees the same global batches (elastic determinism, as in MosaicML Streaming).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class BatchOrder:
    """The order in which a split of `num_tokens` tokens is read, in windows of `block_size`.

    In each epoch exactly one window starts in each stretch of `block_size` tokens, at a freshly
    drawn offset; the stretches are shuffled. An epoch thus covers the split as evenly as adjacent
    windows would, but each epoch shows tokens at other positions and in other contexts, as random
    offsets do: on Tiny Shakespeare, adjacent windows cost 0.01 nats of validation loss. A batch may
    end one epoch and begin the next.
    """

    def __init__(self, num_tokens: int, block_size: int, *, seed: int) -> None:
        """Raises ValueError if the split holds no whole window and its targets."""
        if num_tokens < block_size + 1:
            raise ValueError(
                f"the split has {num_tokens} tokens, fewer than block_size + 1 = {block_size + 1}"
            )
        self.num_tokens = num_tokens
        self.block_size = block_size
        self.seed = seed
        # The last stretch has no room for a random offset, so it counts only if it is the only one.
        self.windows_per_epoch = max(1, (num_tokens - 1) // block_size - 1)
        self._epoch_starts = lru_cache(maxsize=2)(self._draw_epoch)

    def batch(self, step: int, global_batch_size: int) -> NDArray[np.int64]:
        """Where the windows of the step's global batch start, (global_batch_size,), in tokens.

        A window at `start` reads tokens [start, start + block_size) and predicts
        [start + 1, start + block_size + 1). Steps count from 0.
        """
        first = step * global_batch_size
        positions = np.arange(first, first + global_batch_size)
        epochs, places = np.divmod(positions, self.windows_per_epoch)
        starts = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            starts[here] = self._epoch_starts(int(epoch))[places[here]]
        return starts

    def epoch(self, step: int, global_batch_size: int) -> float:
        """Epochs read after `step` optimizer steps."""
        return step * global_batch_size / self.windows_per_epoch

    def _draw_epoch(self, epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng([self.seed, epoch])
        room = min(self.block_size, self.num_tokens - self.windows_per_epoch * self.block_size)
        stretches = rng.permutation(self.windows_per_epoch)
        return self.block_size * stretches + rng.integers(room, size=self.windows_per_epoch)


def replace_tokens(
    inputs: NDArray[np.int64], share: float, vocab_size: int, *, seed: int, step: int, first: int
) -> None:
    """Replace a share of the inputs (B, T), in place, with random tokens, against memorisation.

    The rows are `first`, `first + 1`, ... of the step's global batch. A row's replacements depend
    only on (seed, step, row number), not on micro-batches or workers. (Xie et al. 2017, Data
    Noising as Smoothing in Neural Network Language Models)
    """
    for number, row in enumerate(inputs, start=first):
        # A counter per row: the state of a shared generator would depend on the rows before.
        bits = np.random.Philox(key=seed, counter=[0, 0, number, step])
        drawn = np.random.Generator(bits).random(row.size)
        chosen = drawn < share
        row[chosen] = (drawn[chosen] / share * vocab_size).astype(np.int64)
