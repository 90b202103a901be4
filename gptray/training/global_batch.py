"""A step's global batch, in micro-batches, with the number of targets in each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptray.config import Config
from gptray.data.order import BatchOrder, replace_tokens
from gptray.data.tokens import TokenData
from gptray.model.loss import IGNORED


@dataclass(frozen=True)
class GlobalBatch:
    """The global batch after `position` updates; its micro-batches are numbered from 0."""

    config: Config
    data: TokenData
    order: BatchOrder
    position: int

    def micro_batch(self, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (B, T) each; those not to learn are IGNORED."""
        size, block_size = self.config.micro_batch_size, self.config.train.block_size
        first, share = number * size, self.config.data.token_replacement
        # The GPU copies from pinned memory while the host continues.
        is_pinned = device.type == "cuda"
        both = torch.empty(2, size, block_size, dtype=torch.int64, pin_memory=is_pinned)
        inputs, targets = both.numpy()
        for row, start in enumerate(self._starts[first : first + size].tolist()):
            tokens = self.data.train.slice(start, start + block_size + 1)
            inputs[row], targets[row] = tokens[:-1], tokens[1:]
        if self.data.train.document_prefix:
            targets[~self.data.train.counts(targets)] = IGNORED
        if share:
            vocabulary, seed = self.data.vocab_size, self.config.seed
            replace_tokens(inputs, share, vocabulary, seed=seed, step=self.position, first=first)
        idx, next_idx = both.to(device, non_blocking=True)
        return idx, next_idx

    def counts(self) -> list[int]:
        """The number of targets in each micro-batch, ignored ones left out."""
        size, block_size = self.config.micro_batch_size, self.config.train.block_size
        split = self.data.train
        if not split.document_prefix:
            return [size * block_size] * self.config.micro_batches
        of_rows = [
            int(split.counts(split.slice(start + 1, start + 1 + block_size)).sum())
            for start in self._starts.tolist()
        ]
        return [sum(of_rows[row : row + size]) for row in range(0, len(of_rows), size)]

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return self.order.batch(self.position, self.config.train.global_batch_size)
