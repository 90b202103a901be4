"""How one sequence is sampled, and what is refused: no torch, so that jobs can check it at once.

Names and meaning are Hugging Face's GenerationConfig, or OpenAI's where that has none, in their
order: bias, repetition penalty, frequency and presence penalty, minimum length, temperature,
top-k, top-p, min-p.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from gptray.config import SampleConfig

SEEDS = 2**63
# Seeds made here stay whole where a program keeps them as floats: JavaScript, a pandas column.
_DERIVED_SEEDS = 2**53


@dataclass(frozen=True)
class Sampling:
    """Settings of one sequence.

    temperature: 0 takes the likeliest token. top_k, top_p, min_p, stop: None or empty is off.
    max_new_tokens counts the end-of-text token; min_new_tokens forbids it before. ignore_eos: the
    end-of-text token is one like any other. repetition_penalty divides the logits of all tokens
    that were there; presence_penalty is taken off those of the output's tokens, frequency_penalty
    as often as they are there. logit_bias: (token id, what to add), -100 to 100, an id once.
    logprobs: how many of the likeliest tokens to report at each position; None reports none.
    Raises ValueError naming the setting that is impossible.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, 0)
        _whole("min_new_tokens", self.min_new_tokens, 0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is above "
                f"max_new_tokens={self.max_new_tokens}"
            )
        _real("temperature", self.temperature, low=0.0, high=math.inf)
        if self.top_k is not None:
            _whole("top_k", self.top_k, 1)
        if self.top_p is not None:
            _real("top_p", self.top_p, low=0.0, high=1.0, open_low=True)
        if self.min_p is not None:
            _real("min_p", self.min_p, low=0.0, high=1.0)
        _real("repetition_penalty", self.repetition_penalty, low=0.0, high=math.inf, open_low=True)
        _real("presence_penalty", self.presence_penalty, low=-2.0, high=2.0)
        _real("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0)
        for token, bias in self.logit_bias:
            _whole("logit_bias's token", token, 0)
            _real("logit_bias", bias, low=-100.0, high=100.0)
        if len(dict(self.logit_bias)) < len(self.logit_bias):
            raise ValueError("logit_bias names a token twice")
        _whole("seed", self.seed, 0)
        if self.seed >= SEEDS:
            raise ValueError(f"seed={self.seed} must be below 2^63")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop={list(self.stop)!r} must be texts of at least one character")

    @classmethod
    def of(cls, config: SampleConfig, **changes: Any) -> Sampling:
        """The `sample` section's settings, some of them changed (a row's own columns)."""
        values: dict[str, Any] = {
            field.name: getattr(config, field.name)
            for field in fields(cls)
            if hasattr(config, field.name)
        }
        values |= changes
        stop = values["stop"]
        values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop or ())
        return cls(**values)


def derived_seed(seed: int, *key: int | str) -> int:
    """A seed of its own for whatever `key` names under `seed`: a row's id, the number of a sample.

    Equal arguments give equal seeds on every machine; 1 and "1" are one key. Below 2^53.
    """
    text = "\x1f".join(map(str, (seed, *key)))
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _DERIVED_SEEDS


def numbered_seed(seed: int, number: int) -> int:
    """The seed of draw `number` of several under one seed; the first has that seed itself."""
    return derived_seed(seed, number) if number else seed


def check_context(prompt: Sequence[int], sampling: Sampling, n_positions: int) -> None:
    """Refuse what the model's context of `n_positions` tokens cannot hold.

    A sequence that reaches `n_positions` tokens, prompt and new ones together, simply ends there.
    Raises ValueError.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
    if len(prompt) + min(sampling.max_new_tokens, 1) > n_positions:
        raise ValueError(
            f"the prompt is too long: {len(prompt)} tokens leave no room for a new one in the "
            f"model's context of {n_positions}"
        )
    if sampling.max_new_tokens > n_positions:
        raise ValueError(
            f"max_new_tokens={sampling.max_new_tokens} is more than the model's context of "
            f"{n_positions} tokens holds"
        )


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, at least {least}")


def _real(name: str, value: Any, *, low: float, high: float, open_low: bool = False) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    # NaN fails every comparison; infinity is no number to divide by.
    inside = real and (low < value if open_low else low <= value) and value <= high
    if not inside or math.isinf(value):
        border = "above" if open_low else "at least"
        upper = "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{name}={value!r} must be {border} {low:g}{upper}")
