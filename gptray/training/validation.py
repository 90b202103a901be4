"""The loss over a whole split: sum of token losses / number of tokens, reduced over all workers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from gptray.config import Config
from gptray.data.scoring import Score, Windows
from gptray.data.tokens import TokenData, TokenSplit
from gptray.model.gpt import GPT
from gptray.training.averaging import Average
from gptray.training.building import build_model
from gptray.training.device import use_device
from gptray.training.kernel_choice import agree_on_backend
from gptray.training.workers import Workers

log = logging.getLogger("gptray")


@dataclass(frozen=True)
class Scores:
    """Validation scores of a model's weights and, with train.ema, of their average.

    also: scores of the texts of evaluate.also, by name, with the better of the two.
    """

    own: Score
    averaged: Score | None = None
    also: Mapping[str, Score] = field(default_factory=dict)

    @property
    def not_finite(self) -> Score | None:
        """The first score, of any weights and text, that is not finite; None if all are finite."""
        scores = (self.own, self.averaged, *self.also.values())
        return next((one for one in scores if one and not one.is_finite), None)

    @property
    def is_averaged(self) -> bool:
        """Whether the average is better than the weights."""
        return self.averaged is not None and self.averaged.loss < self.own.loss

    @property
    def better(self) -> Score:
        """The score with the lower loss, which is the evaluation's result."""
        return self.averaged if self.averaged and self.is_averaged else self.own


def score_checkpoint(
    config: Config, data: TokenData, checkpoint: Path, device: torch.device, *, run_dir: Path
) -> tuple[Scores, GPT]:
    """Score a run's checkpoint as its worker would; also return the better model.

    run_dir: the run folder, which records the backend.
    """
    use_device(config, device)
    workers = Workers(rank=0, size=1)
    # The backend that the run itself uses.
    choice = agree_on_backend(config, run_dir, workers, device, log.warning)
    is_native = choice.backend == "native"
    model = build_model(config, data, checkpoint, device, native=is_native).to(device)
    average = Average.of(model, config, checkpoint)
    scores = score_weights(model, average, config, data, workers)
    if average and scores.is_averaged:
        average.swap()
    return scores, model


def score_weights(
    model: GPT, average: Average | None, config: Config, data: TokenData, workers: Workers
) -> Scores:
    """Score the validation split with the weights and with their average, if there is one.

    Then score the texts of evaluate.also with the better of the two.
    """
    score = partial(
        score_split,
        model,
        block_size=config.train.block_size,
        batch_size=config.micro_batch_size,
        workers=workers,
    )
    scores = Scores(score(data.val))
    if average:
        with average.swapped():
            scores = replace(scores, averaged=score(data.val))
    with average.swapped() if average and scores.is_averaged else nullcontext():
        also = {name: score(one.splits["test"]) for name, one in data.also.items()}
    return replace(scores, also=also)


@torch.no_grad()
def score_split(
    model: GPT, split: TokenSplit, *, block_size: int, batch_size: int, workers: Workers
) -> Score:
    """Score every token of the split but its first, once, in windows of `block_size`.

    Tokens that begin a document are read but not scored.
    Text that the tokenizer loses is charged, see `Score`.
    The windows are divided among the workers and their sums added in float64, so that neither the
    number of workers nor the batch size changes the loss beyond rounding.
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
        counts = torch.from_numpy(split.counts(batch[:, 1:])).to(device)
        total[0] += torch.where(counts, losses.double(), 0.0).sum()
        total[1] += counts.sum()
    for _ in range(idle):  # other workers still score, and all must take part
        model.token_losses(*torch.zeros(2, 1, 1, dtype=torch.int64, device=device))
    nats, count = workers.sum(total).tolist()
    model.train(was_training)
    return Score.charged(nats, int(count), split.bytes, split.lost_bytes)
