"""Requests in OpenAI's and vLLM's format, with every key checked; null means left out.

One error message lists all problems by key. `gptray.serving.completions` checks requests against
the model and the server's limits.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Annotated, TypeGuard, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from gptray.config.keys import FieldSpec, field_specs
from gptray.config.limits import MAX_BIASES, SEEDS, within
from gptray.config.suggest import did_you_mean, nearest
from gptray.serving.api_error import ApiError
from gptray.serving.other_keys import complaint_about
from gptray.storage.stored import is_whole

T = TypeVar("T", bound=BaseModel)
Prompt = str | list[int]

STOP_CHARACTERS = 256

_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")

# Keys that are passed to the sampler unchanged.
SAMPLED = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "ignore_eos", "stop", "stop_token_ids", "include_stop_str_in_output",
    "skip_special_tokens", "logprobs",
)  # fmt: skip

# The most wrong keys that a message lists.
MAX_PROBLEMS = 12


def _prompts(value: object) -> list[Prompt]:
    if isinstance(value, str) or _is_ids(value):
        return [value]
    several = value if isinstance(value, list) else []
    if several and (all(isinstance(one, str) for one in several) or all(map(_is_ids, several))):
        return list(several)
    raise ValueError("expects text, a list of texts, token ids or a list of lists of token ids")


def _is_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _stop_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(map(is_whole, value)):
        raise ValueError("expects a list of token ids")
    return tuple(value)


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("expects text or a list of texts, none of them empty")
    if any(len(stop) > STOP_CHARACTERS for stop in stops):
        raise ValueError(f"takes texts of at most {STOP_CHARACTERS} characters")
    return tuple(stops)


def _bias(value: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict) or not all(map(_is_bias, value.items())):
        raise ValueError("expects an object of token ids, each with a number from -100 to 100")
    if len(value) > MAX_BIASES:
        raise ValueError(f"may have at most {MAX_BIASES} entries, has {len(value)}")
    return tuple((int(token), float(bias)) for token, bias in value.items())


def _is_bias(item: tuple[str, object]) -> bool:
    token, bias = item
    if not isinstance(bias, (int, float)) or isinstance(bias, bool):
        return False
    return bool(_TOKEN_ID.fullmatch(token)) and abs(bias) <= 100


def _seed(value: object) -> object:
    """OpenAI's seeds are signed; a negative one becomes the unsigned one with the same bits."""
    if type(value) is int and -SEEDS <= value < 0:
        return value % SEEDS
    return value


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: inner for key, inner in value.items() if inner is not None}
    return value


class Strict(BaseModel):
    """Rejects unknown keys and converts no types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class GenerationRequest(Strict):
    """The keys common to completions and chats: how outputs are sampled and sent."""

    model: str | None = None
    min_tokens: Annotated[int, within("min_new_tokens")] = 0
    temperature: Annotated[float, within("temperature")] = 1.0
    top_p: Annotated[float, within("top_p")] = 1.0
    top_k: Annotated[int, within("top_k", low=-1)] = -1
    min_p: Annotated[float, within("min_p")] = 0.0
    n: Annotated[int, Field(ge=1)] = 1
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = ()
    stop_token_ids: Annotated[tuple[int, ...], PlainValidator(_stop_ids)] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = False
    seed: Annotated[int, within("seed"), BeforeValidator(_seed)] | None = None
    presence_penalty: Annotated[float, within("presence_penalty")] = 0.0
    frequency_penalty: Annotated[float, within("frequency_penalty")] = 0.0
    repetition_penalty: Annotated[float, within("repetition_penalty")] = 1.0
    logit_bias: Annotated[tuple[tuple[int, float], ...], PlainValidator(_bias)] = ()
    ignore_eos: bool = False
    # Keep only the prompt's last tokens, at most so many.
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    # Whether to add the ids of the prompt and the output, and to name tokens by their ids.
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    stream: bool = False
    stream_options: Annotated[StreamOptions, BeforeValidator(_without_nulls)] | None = None


class CompletionRequest(GenerationRequest):
    """The keys of POST /v1/completions. Limits of the model and server are checked later."""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts)]
    max_tokens: Annotated[int, within("max_new_tokens")] = 16
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool = False
    logprobs: Annotated[int, within("logprobs")] | None = None
    # Whether the prompt gets the tokens that the tokenizer adds before a text.
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _keys_agree(self) -> CompletionRequest:
        check_min_tokens(self.min_tokens, self.max_tokens)
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 needs echo=true")
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of={self.best_of} must be n={self.n}: all outputs are returned")
        return self


def check_min_tokens(min_tokens: int, max_tokens: int) -> None:
    """Raise ValueError if min_tokens is above max_tokens."""
    if min_tokens > max_tokens:
        raise ValueError(f"min_tokens={min_tokens} must not be above max_tokens={max_tokens}")


class TokenizeRequest(Strict):
    """POST /tokenize."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


def parse_request(kind: type[T], given: Mapping[str, object]) -> T:
    """Parse a body's JSON object as a request. Raises ApiError(400) listing every wrong key."""
    specs = field_specs(kind)
    problems: dict[str, str] = {}
    known: dict[str, object] = {}
    for key, value in given.items():
        snake = _snake_case(key)
        if value is None or (snake != key and given.get(snake) is not None):
            continue
        if key in specs:
            known[key] = _whole_number(value) if int in specs[key].kinds else value
        elif (problem := complaint_about(key, value, specs)) is not None:
            if len(problems) == MAX_PROBLEMS:
                problems[key] = "... and more"
                break
            problems[key] = problem
    try:
        request = kind.model_validate(known)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            key = str(detail["loc"][0]) if detail["loc"] else "body"
            problems.setdefault(key, _complaint(key, specs, known, detail))
    if problems:
        first, sentence = next(iter(problems.items()))
        param = key_of(sentence, specs) if first == "body" else first[:60]
        raise ApiError(400, "\n".join(problems.values()), param=param)
    return request


def key_of(sentence: str, keys: Container[str]) -> str | None:
    """The key that a sentence begins with, if any: n for "n=3 is too many"."""
    word = re.split(r"\W", sentence, maxsplit=1)[0]
    return word if word in keys else None


def _snake_case(key: str) -> str:
    """Convert camelCase; some JavaScript clients send a key in both forms."""
    return re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", key[:60])


def _whole_number(value: object) -> object:
    """4 for 4.0, which languages without integers send."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _complaint(
    key: str, specs: Mapping[str, FieldSpec], known: Mapping[str, object], detail: ErrorDetails
) -> str:
    if key == "body":
        return str(detail["ctx"]["error"])
    reason = str(detail.get("ctx", {}).get("error", ""))
    if reason.startswith((f"{key}[", f"{key} ")):  # already names the key
        return reason
    if detail["type"] == "missing":
        return f"{key} is missing"
    if detail["type"] == "extra_forbidden":
        inner = str(detail["loc"][-1])
        near = nearest(inner, StreamOptions.model_fields)
        return f"unknown key {key}.{inner[:60]}{did_you_mean(near)}"
    return f"{key} {specs[key].complaint(known[key], detail)}"
