"""The loss over a whole split: sum of token losses / number of tokens, reduced over all workers."""

from __future__ import annotations

import torch

from gptray.data.scoring import Score, Windows
from gptray.data.tokens import TokenSplit
from gptray.model.gpt import GPT
from gptray.training.workers import Workers


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
    windows = Windows(len(split), block_size, stride=block_size)
    mine = range(workers.rank, len(windows), workers.size)
    for _, batch in windows.batches(split, mine, batch_size):
        tokens = torch.from_numpy(batch).to(device)  # (B, T + 1)
        losses = model.token_losses(tokens[:, :-1], tokens[:, 1:])  # (B, T)
        total[0] += losses.double().sum()
        total[1] += losses.numel()
    nats, count = workers.sum(total).tolist()
    model.train(was_training)
    return Score(nats=nats, tokens=int(count), num_bytes=split.bytes)
