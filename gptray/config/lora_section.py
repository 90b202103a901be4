"""The config's `lora` section: a low-rank adapter for a frozen model."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from gptray.config.values import NonEmpty, Positive, PositiveInt, Probability, Section, only

# The default learning rate of an adapter divided by that of all weights (Schulman et al. 2025, LoRA
# Without Regret).
LEARNING_RATE_FACTOR = 10


class LoraConfig(Section):
    """The fields follow PEFT's LoraConfig: r, lora_alpha, lora_dropout and so on."""

    rank: PositiveInt | None = Field(
        None,
        description="train an adapter of this rank (LoRA) and freeze the weights of "
        "model.init_from; null: train all weights",
    )
    alpha: Positive = Field(16.0, description="the adapter is scaled by alpha / sqrt(rank)")
    use_rslora: bool = Field(
        True, description="false: scale by alpha / rank instead, as in the original paper"
    )
    dropout: Probability = Field(0.0, description="dropout on the adapter's input")
    targets: Annotated[list[NonEmpty], Field(min_length=1)] | None = Field(
        None,
        description="linear layers to adapt, by their names in transformers, such as [q_proj, "
        "v_proj]; null: all in the blocks",
    )
    train: Annotated[list[str], only("norms", "embeddings")] = Field(
        [],
        description="what else to train, in full: norms, embeddings (with the head), or both",
    )

    @property
    def scale(self) -> float:
        """The factor of the adapter's product (rsLoRA: Kalajdzievski 2023)."""
        assert self.rank
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)
