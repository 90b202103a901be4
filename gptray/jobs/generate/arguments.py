"""Checks the arguments of `LLM`: keywords, texts and chats; anything else is refused by name."""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from gptray.config import UserError
from gptray.config.suggest import did_you_mean, nearest_keys
from gptray.generation.chat_template import Message


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
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Integral) and not isinstance(value, bool):  # numpy's too
        return int(value)
    return list(value) if isinstance(value, tuple) else value


def texts_of(prompts: str | abc.Sequence[str]) -> list[str]:
    """One text or several, as a list. Raises UserError for anything else."""
    if not isinstance(prompts, abc.Iterable) or isinstance(prompts, (Mapping, bytes)):
        raise UserError(f"prompts must be text or a list of texts, got {type(prompts).__name__}")
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    for number, prompt in enumerate(given):
        if not isinstance(prompt, str):
            raise UserError(f"prompts[{number}] must be a string, got {type(prompt).__name__}")
    return given


def chats_of(messages: abc.Sequence[Message] | abc.Sequence[abc.Sequence[Message]]) -> list[object]:
    """One chat or several, as a list."""
    several = isinstance(messages, abc.Sequence) and messages
    if not several or isinstance(messages[0], Mapping):
        return [messages]
    return [*messages]
