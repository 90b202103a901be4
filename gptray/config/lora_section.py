"""The config's `lora` section: a low-rank adapter of a model that stays as it is."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, field_validator

from gptray.config.values import NonEmpty, Positive, PositiveInt, Probability, Section

# Full tuning's best learning rate times this is about an adapter's.
LEARNING_RATE_FACTOR = 10


class LoraConfig(Section):
    """Names and meaning are those of PEFT's LoraConfig: r, lora_alpha, lora_dropout and so on."""

    rank: PositiveInt | None = Field(
        None,
        description="train an adapter of this rank (LoRA) and freeze the weights of "
        "model.init_from; optim.lr and optim.min_lr are then ten times as high unless given; "
        "null: train all weights",
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
    train: list[str] = Field(
        [],
        description="what else to train, in full: norms, embeddings (with the head), or both",
    )

    @property
    def scale(self) -> float:
        """What the adapter's product is multiplied by (Kalajdzievski 2023, rsLoRA)."""
        assert self.rank
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @field_validator("train")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in ("norms", "embeddings"):
                raise ValueError(f"takes norms and embeddings, not {name}")
        return value
