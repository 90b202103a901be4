"""The config's `quantize` section: weights in few bits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gptray.config.values import Section

# Kinds of weights in few bits.
QUANTIZED = ("int8", "int4", "iq4_nl")


class QuantizeConfig(Section):
    weights: Literal["none", "int8", "int4", "iq4_nl"] = Field(
        "none",
        description="weights of the model that generates or is evaluated, and with lora.rank of "
        "the base that is trained on; int8: half the memory of bf16, slightly less exact; int4: a "
        "third, with a scale for every 32 inputs (the head stays int8), less exact; iq4_nl: the "
        "same bytes, more exact; all are faster on CPUs that have the native kernels",
    )
