"""Bounds of counts, and of the sampling settings: one table for every interface.

The config's `sample` section, columns of a batch, HTTP and Python all check against it. Within
its bounds no setting can overflow a float, refer to something that does not exist, or slow down
other sequences in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field
from pydantic.fields import FieldInfo


class Bounds(NamedTuple):
    """A range from `low` to `high`, both included."""

    low: float
    high: float


# The largest count of anything: what a 32-bit integer holds.
LARGEST = 2**31 - 1
# The most processes of one job; Ray is tested up to some ten thousand.
MAX_PROCESSES = 10_000
# The most trials of a sweep: each takes half a millisecond to plan.
MAX_TRIALS = 10_000
MAX_LAYERS = 10_000
SEEDS = 2**63
# Dividing logits by a lower temperature could overflow a float, so a lower one means greedy.
GREEDY_BELOW = 1e-5
MAX_BIASES = 1024

SAMPLING = {
    "max_new_tokens": Bounds(0, LARGEST),
    "min_new_tokens": Bounds(0, LARGEST),
    "temperature": Bounds(0, 100),
    "top_k": Bounds(1, LARGEST),
    "top_p": Bounds(0, 1),
    "min_p": Bounds(0, 1),
    "repetition_penalty": Bounds(0.01, 100),
    "presence_penalty": Bounds(-2, 2),
    "frequency_penalty": Bounds(-2, 2),
    "logit_bias": Bounds(-100, 100),
    "logprobs": Bounds(0, LARGEST),
    "seed": Bounds(0, SEEDS - 1),
}


def within(name: str, *, low: float | None = None) -> FieldInfo:
    """A setting's bounds for pydantic; `low` replaces the table's lower bound."""
    bounds = SAMPLING[name]
    found: FieldInfo = Field(ge=bounds.low if low is None else low, le=bounds.high)
    return found
