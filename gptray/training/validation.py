"""The loss over a whole split: sum of token losses / number of tokens, reduced over all workers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gptray.data.tokens import TokenSplit
from gptray.model.gpt import GPT
from gptray.training.workers import Workers


@dataclass(frozen=True)
class Score:
    """Nats over `tokens` predicted tokens of a text of `num_bytes` UTF-8 bytes."""

    nats: float
    tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer: loss x tokens / (ln 2 x bytes)."""
        return self.nats / (math.log(2) * self.num_bytes)


@torch.no_grad()
def score_split(
    model: GPT, split: TokenSplit, *, block_size: int, batch_size: int, workers: Workers
) -> Score:
    """Score every token of the split but its first, once, in windows of `block_size`.

    The windows are shared out over the workers and their sums added in float64, so that neither
    the number of workers nor the batch size changes the loss beyond rounding.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
    for windows in _batches(split, block_size, batch_size, workers):
        tokens = torch.from_numpy(windows).to(device)  # (B, T + 1)
        losses = model.token_losses(tokens[:, :-1], tokens[:, 1:])  # (B, T)
        total[0] += losses.double().sum()
        total[1] += losses.numel()
    nats, count = workers.sum(total).tolist()
    model.train(was_training)
    return Score(nats=nats, tokens=int(count), num_bytes=split.bytes)


def _batches(
    split: TokenSplit, block_size: int, batch_size: int, workers: Workers
) -> Iterator[NDArray[np.int64]]:
    """This worker's windows, (B, T + 1) each; the last window of the split may be shorter."""
    targets = len(split) - 1
    whole, rest = divmod(targets, block_size)
    mine = range(workers.rank, whole, workers.size)
    for first in range(0, len(mine), batch_size):
        chosen = mine[first : first + batch_size]
        yield np.stack([split.slice(n * block_size, (n + 1) * block_size + 1) for n in chosen])
    if rest and whole % workers.size == workers.rank:
        yield split.slice(whole * block_size, targets + 1)[None]
