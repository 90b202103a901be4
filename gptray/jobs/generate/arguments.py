"""Checks the arguments of `LLM`: keywords, prompts, chats; anything else is refused by name."""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

from gptray.config import UserError
from gptray.config.suggest import did_you_mean, nearest_keys
from gptray.config.use_sections import ROW_SETTINGS
from gptray.data.chat_template import Message

# The keywords of `LLM` and the config's keys that they set.
OPTIONS = {
    "storage_path": "storage_path",
    "precision": "generate.precision",
    "quantize": "quantize.weights",
    "use_gpu": "compute.use_gpu",
    "backend": "generate.backend",
    "max_batch_size": "generate.max_batch_size",
}
# The keywords of `generate` and `stream`: keys of the config's `sample` section.
SETTINGS = {name: f"sample.{name}" for name in (*ROW_SETTINGS, "parse_special")}


class Options(TypedDict, total=False):
    """How to open a model; a job's `--help` says more about each key named here.

    storage_path: the folder in which names of runs are looked up. precision (generate.precision):
    auto, fp32 or bf16. quantize (quantize.weights): none, int8, int4 or iq4_nl. use_gpu
    (compute.use_gpu). backend (generate.backend): auto, native or torch. max_batch_size
    (generate.max_batch_size): how many prompts run at a time.
    """

    storage_path: str
    precision: str
    quantize: str
    use_gpu: bool
    backend: str
    max_batch_size: int


class Settings(TypedDict, total=False):
    """How to sample: the config's `sample` section, with its names and defaults."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    stop: str | abc.Sequence[str] | None
    stop_token_ids: abc.Sequence[int] | None
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    utf8: bool
    seed: int
    parse_special: bool


class TokensPrompt(TypedDict):
    """A prompt's token ids, as vLLM takes them."""

    prompt_token_ids: abc.Sequence[int]


class TextPrompt(TypedDict):
    """A prompt's text, as vLLM takes it."""

    prompt: str


# A text, or token ids to which the tokenizer adds nothing.
Prompt = str | abc.Sequence[int] | TokensPrompt | TextPrompt
_FORMS = ("prompt_token_ids", "prompt")


def values_of(given: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """A call's keywords as config values. Raises UserError for unknown keywords."""
    for name in given:
        if name not in keys:
            keywords = {key: keyword for keyword, key in keys.items()}
            near = [keywords[key] for key in nearest_keys(name, list(keywords))]
            raise UserError(f"unknown keyword {name}{did_you_mean(*near)}")
    return {keys[name]: _plain(value) for name, value in given.items()}


def _plain(value: Any) -> Any:
    """A value in the type that a config has."""
    value = _python(value)
    if isinstance(value, Path):
        return str(value)
    return [*map(_plain, value)] if isinstance(value, (list, tuple)) else value


def _python(value: object) -> object:
    """A number, array or tensor of another library as Python's own."""
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


# Bytes are no token ids, and a set has no order, on which seeds depend.
_NOT_PROMPTS = (abc.Set, bytes, bytearray)


def prompts_of(prompts: Prompt | abc.Sequence[Prompt]) -> list[str | list[int]]:
    """One prompt or several, as a list of texts and token ids. Raises UserError for others."""
    given = _python(prompts)
    if isinstance(given, (str, Mapping)) or (_are_ids(given) and given):
        return [_prompt_of(given, "prompts")]
    if not isinstance(given, abc.Iterable) or isinstance(given, _NOT_PROMPTS):
        kind = type(given).__name__
        raise UserError(f"prompts must be text, token ids or a list of either, got {kind}")
    return [_prompt_of(prompt, f"prompts[{number}]") for number, prompt in enumerate(given)]


def _prompt_of(prompt: object, place: str) -> str | list[int]:
    if isinstance(prompt, Mapping):
        form = next((form for form in _FORMS if prompt.get(form) is not None), None)
        if form is None or not {*prompt} <= {*_FORMS}:
            raise UserError(f"{place} must have prompt_token_ids or prompt, got {[*prompt]!r:.60}")
        prompt, place = prompt[form], f"{place}[{form!r}]"
    given = _python(prompt)
    if isinstance(given, str):
        return given
    if _are_ids(given):
        return [*map(int, given)]
    raise UserError(f"{place} must be text or token ids, got {type(prompt).__name__}")


def _are_ids(value: object) -> TypeGuard[abc.Collection[int]]:
    return (
        isinstance(value, abc.Collection)
        and not isinstance(value, (str, Mapping, *_NOT_PROMPTS))
        and all(isinstance(one, Integral) and not isinstance(one, bool) for one in value)
    )


def chats_of(messages: abc.Sequence[Message] | abc.Sequence[abc.Sequence[Message]]) -> list[object]:
    """One chat or several, as a list."""
    several = isinstance(messages, abc.Sequence) and messages
    if not several or isinstance(messages[0], Mapping):
        return [messages]
    return [*messages]
