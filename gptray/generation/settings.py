"""How one sequence is sampled, and which settings are valid. No torch, so jobs check it quickly.

Names and meanings are those of Hugging Face's GenerationConfig, or where that has none, OpenAI's
or vLLM's. They apply in this order: bias, repetition penalty, frequency and presence penalty,
minimum length, whole characters, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

from gptray.config import SampleConfig, UserError
from gptray.config.limits import GREEDY_BELOW, MAX_BIASES, SAMPLING
from gptray.storage.stored import is_whole
from gptray.wording import shortened

# Of the settings with bounds; the others take any real number.
_WHOLE = ("max_new_tokens", "min_new_tokens", "top_k", "logprobs", "seed")
_OPTIONAL = ("top_k", "top_p", "min_p", "logprobs")
# Derived seeds stay exact in programs that store them as floats, such as JavaScript and pandas.
_DERIVED_SEEDS = 2**53


@dataclass(frozen=True)
class Sampling:
    """The sampling settings of one sequence; `gptray.config.limits` has their bounds.

    max_new_tokens counts the token that ends the text. Until min_new_tokens tokens are drawn, every
    such token is banned, and stop strings do not count. temperature: 0 is greedy. top_k, top_p,
    min_p, stop, stop_token_ids: None or empty is off.
    repetition_penalty: divides positive logits of all tokens so far, and multiplies negative ones.
    presence_penalty: subtracted from the logits of tokens in the output; frequency_penalty: once
    for each time they occur there. logit_bias: (token id, what to add), each id once. ignore_eos:
    treat end-of-text like any other token. skip_special_tokens: leave their names out of the text.
    utf8: draw no token that would break a character. stop, stop_token_ids: texts and tokens that
    end the output where they begin or, with include_stop_str_in_output, where they end. logprobs:
    how many of the likeliest tokens to report at each position; None reports none.

    Raises ValueError naming the setting that is invalid.
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
    skip_special_tokens: bool = False
    utf8: bool = True
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in SAMPLING:
            if name != "logit_bias":
                _check(name, getattr(self, name))
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is above "
                f"max_new_tokens={self.max_new_tokens}"
            )
        self._check_bias()
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop={list(self.stop)!r} must be texts of at least one character")
        if not all(map(is_whole, self.stop_token_ids)):
            raise ValueError(
                f"stop_token_ids={_short(list(self.stop_token_ids))} must be token ids"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def _check_bias(self) -> None:
        if len(self.logit_bias) > MAX_BIASES:
            raise ValueError(
                f"logit_bias has {len(self.logit_bias)} entries, more than {MAX_BIASES}"
            )
        for token, bias in self.logit_bias:
            if not is_whole(token):
                raise ValueError(f"logit_bias names {token!r}, which is not a token id")
            _check("logit_bias", bias)
        if len(dict(self.logit_bias)) < len(self.logit_bias):
            raise ValueError("logit_bias names a token twice")

    @classmethod
    def of(cls, config: SampleConfig, **changes: object) -> Sampling:
        """The `sample` section's settings, with some replaced, such as by a row's own columns."""
        values: dict[str, Any] = {  # of any type: __post_init__ checks each
            field.name: getattr(config, field.name)
            for field in fields(cls)
            if hasattr(config, field.name)
        }
        values |= changes
        stop = values["stop"]
        values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop or ())
        values["stop_token_ids"] = tuple(values["stop_token_ids"] or ())
        return cls(**values)


def check_stop_ids(sample: SampleConfig, vocab_size: int) -> None:
    """Raise UserError if the section's `stop_token_ids` names a token that the model lacks."""
    last = vocab_size - 1
    unknown = next((token for token in sample.stop_token_ids or () if token > last), None)
    if unknown is not None:
        raise UserError(f"sample.stop_token_ids: {unknown} is outside the vocabulary, 0 .. {last}")


def derived_seed(seed: int, *key: int | str) -> int:
    """A seed below 2^53 for what `key` names, such as a row's id or the number of a sample.

    Equal arguments give equal seeds on every machine; 1 and "1" are the same key.
    """
    text = "\x1f".join(map(str, (seed, *key)))
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _DERIVED_SEEDS


def numbered_seed(seed: int, number: int) -> int:
    """The seed of sample `number` of several with one seed; number 0 has that seed itself."""
    return derived_seed(seed, number) if number else seed


class PromptTooLong(ValueError):
    """A prompt that leaves no room for a token in the model's context."""


def _check(name: str, value: object) -> None:
    """Raise ValueError unless the value is off, or a number within the setting's bounds."""
    if value is None and name in _OPTIONAL:
        return
    low, high = SAMPLING[name]
    is_whole = name in _WHOLE
    # NaN fails every comparison.
    if (
        not isinstance(value, int if is_whole else (int, float))
        or isinstance(value, bool)
        or not low <= value <= high
    ):
        what = "a whole number" if is_whole else "a number"
        raise ValueError(f"{name}={_short(value)} must be {what} from {low} to {high}")


def _short(value: object) -> str:
    return shortened(repr(value), 40)
