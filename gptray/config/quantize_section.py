"""The config's `quantize` section: weights in few bits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gptray.config.values import Section

# Kinds of weights in few bits.
QUANTIZED = ("int8",)


class QuantizeConfig(Section):
    weights: Literal["none", "int8"] = Field(
        "none",
        description="weights of the model that generates or is evaluated, and with lora.rank of "
        "the base that is trained on; int8: faster with large models, slightly less exact, on CPUs",
    )
