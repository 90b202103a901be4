"""The loss over a whole split: sum of token losses / number of tokens, reduced over all workers."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from gptray.config import Config
from gptray.data.scoring import Score, Windows
from gptray.data.tokens import TokenData, TokenSplit
from gptray.model.gpt import GPT
from gptray.training.building import build_model
from gptray.training.device import use_device
from gptray.training.kernel_choice import agree_on_backend
from gptray.training.workers import Workers

log = logging.getLogger("gptray")


def score_checkpoint(
    config: Config, data: TokenData, checkpoint: Path, device: torch.device
) -> tuple[Score, GPT]:
    """Score a checkpoint of a run as one worker of it would; return its model too."""
    use_device(config, device)
    workers = Workers(rank=0, size=1)
    # As the run itself computes, which has started before.
    choice = agree_on_backend(config, checkpoint.parent, workers, device, log.warning)
    is_native = choice.backend == "native"
    model = build_model(config, data, checkpoint, device, native=is_native).to(device)
    score = score_split(
        model,
        data.val,
        block_size=config.train.block_size,
        batch_size=config.micro_batch_size,
        workers=workers,
    )
    return score, model


@torch.no_grad()
def score_split(
    model: GPT, split: TokenSplit, *, block_size: int, batch_size: int, workers: Workers
) -> Score:
    """Score every token of the split but its first, once, in windows of `block_size`.

    What the tokenizer has lost of the split's text is charged, see `Score`.
    The windows are shared out over the workers and their sums added in float64, so that neither
    the number of workers nor the batch size changes the loss beyond rounding.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
    windows = Windows(len(split), block_size, stride=block_size)
    mine = range(workers.rank, len(windows), workers.size)
    own = len(windows.groups(mine, batch_size))
    idle = workers.passes(own) - own
    for _, batch in windows.batches(split, mine, batch_size):
        tokens = torch.from_numpy(batch).to(device)  # (B, T + 1)
        losses = model.token_losses(tokens[:, :-1], tokens[:, 1:])  # (B, T)
        total[0] += losses.double().sum()
        total[1] += losses.numel()
    for _ in range(idle):  # with those that have more
        model.token_losses(*torch.zeros(2, 1, 1, dtype=torch.int64, device=device))
    nats, count = workers.sum(total).tolist()
    model.train(was_training)
    return Score.charged(nats, int(count), split.bytes, split.lost_bytes)
