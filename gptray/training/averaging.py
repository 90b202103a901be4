"""An exponential moving average (EMA) of the weights, scored next to the weights in validation.

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
    """The average of a model's weights, on their device; before any update, it equals them."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._weights: list[Tensor] = list(model.parameters())
        self._averages = [weight.detach().clone() for weight in self._weights]
        self._decay = decay

    @classmethod
    def of(cls, model: GPT, config: Config, checkpoint: Path | None) -> Average | None:
        """The average for a run, restored from its checkpoint if given; None without train.ema."""
        if config.train.ema is None:
            return None
        average = cls(model, config.train.ema)
        if checkpoint:
            average.load(model, checkpoint)
        return average

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Add the current weights, which have had `updates` updates.

        average <- d average + (1 - d) weights, d = min(decay, (1 + updates) / (10 + updates)), so
        that even a short run soon forgets its initial weights (TensorFlow's
        ExponentialMovingAverage).
        """
        decay = min(self._decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Swap the model's weights with their averages."""
        for weight, average in zip(self._weights, self._averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside the `with` block, the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def load(self, model: GPT, checkpoint: Path) -> None:
        """Load the averages from a checkpoint; `model` is the one being averaged."""
        with self.swapped():
            load_weights(model, checkpoint / AVERAGED)
