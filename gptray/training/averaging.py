"""An exponential moving average of the weights, which validation scores next to the weights.

With a constant learning rate it gains some of what a cool-down would (Izmailov et al. 2018;
Morales-Brotons et al. 2024), without taking any steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from gptray.config import Config
from gptray.model.gpt import GPT
from gptray.model.hf import load_weights
from gptray.training.checkpoint import AVERAGED


class Average:
    """The average of a model's weights, on their device; before any update, the weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._weights: list[Tensor] = list(model.parameters())
        self._averages = [weight.detach().clone() for weight in self._weights]
        self._decay = decay

    @classmethod
    def of(cls, model: GPT, config: Config, checkpoint: Path | None) -> Average | None:
        """The average of a run's model, as its checkpoint has it; None without train.ema."""
        if config.train.ema is None:
            return None
        average = cls(model, config.train.ema)
        if checkpoint:
            average.load(model, checkpoint)
        return average

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after that many updates.

        average <- d average + (1 - d) weights, d = min(decay, (1 + updates) / (10 + updates)): a
        short run's average soon forgets the initial weights (TensorFlow's
        ExponentialMovingAverage).
        """
        decay = min(self._decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the averages in the place of the weights, and these in theirs."""
        for weight, average in zip(self._weights, self._averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """In the block the model has the averages for its weights."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def load(self, model: GPT, checkpoint: Path) -> None:
        """Take the averages from a checkpoint, for the model that this averages."""
        with self.exchanged():
            load_weights(model, checkpoint / AVERAGED)
