"""Renders a chat's messages as text, by the tokenizer's own template and with transformers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gptray.data.tokenizer import Tokenizer
from gptray.data.tokenizer_files import (
    hub_tokenizer,
    tokenizer_path,
    tokenizer_sha256,
    tokenizer_template,
)
from gptray.data.written_names import put_together

Message = Mapping[str, str]

# The one key that a message may have besides role and content.
_NAME = "name"
# Variables that transformers and jinja2 set for every template.
_BUILT_IN = ("messages", "self")


def messages_of(value: object) -> list[dict[str, str]]:
    """A chat's messages, each with a role and text content. Raises ValueError naming the fault.

    Content in several parts becomes their texts, joined by newlines. Keys whose value is null or
    empty are ignored.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError("messages expects a list of messages, each with a role and content")
    return [_message(one, f"messages[{number}]") for number, one in enumerate(value)]


def _message(value: object, place: str) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} must be an object with role and content")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{place}.role must be text, such as user")
    for key, given in value.items():
        if key not in ("role", "content", _NAME) and given:
            raise ValueError(f"{place}.{str(key)[:60]} is not supported: this model reads text")
    name = value.get(_NAME)
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{place}.name must be text")
    named = {} if name is None else {_NAME: name}
    return {"role": role, "content": text_of(content, f"{place}.content"), **named}


def text_of(content: object, place: str) -> str:
    """A message's content as text; parts are joined by newlines. Raises ValueError."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)) or not content:
        raise ValueError(f"{place} must be text, or a list of parts of text")
    return "\n".join(_part(part, f"{place}[{number}]") for number, part in enumerate(content))


def _part(part: object, place: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if isinstance(text, str):
        return text
    if not isinstance(part, Mapping):
        raise ValueError(f"{place} must be a part of text")
    kind = part.get("type", "text")
    if kind == "text":
        raise ValueError(f"{place}.text must be text")
    raise ValueError(f"{place} of type {str(kind)[:60]} is not supported: this model reads text")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's template, as Jinja source. Text in a message never becomes a special token."""

    source: str
    tokenizer: Tokenizer

    @classmethod
    def of(cls, tokenizer: str, *, eos_token: str | None) -> ChatTemplate | None:
        """The template of a tokenizer, see `Tokenizer.load`; None if it has none."""
        source = tokenizer_template(tokenizer)
        if source is None:
            return None
        sha256 = tokenizer_sha256(tokenizer_path(tokenizer) or hub_tokenizer(tokenizer))
        return cls(source, _loaded(tokenizer, eos_token, sha256))

    def reads(self, key: str) -> bool:
        """Whether the template mentions a message's key."""
        return re.search(rf"\b{re.escape(key)}\b", self.source) is not None

    def end_of_turn(self) -> int | None:
        """The special token that ends the model's messages; None if the template writes none."""
        said = "Hello."
        try:
            chat = self.write(
                [{"role": role, "content": said} for role in ("user", "assistant")],
                add_generation_prompt=False,
            )
        except ValueError:
            return None  # it refuses a chat this simple
        after = self.tokenizer.written_names.parts(chat.rpartition(said)[2])
        return next((part for part in after if isinstance(part, int)), None)

    def prompt(self, messages: Sequence[Message], **options: Any) -> tuple[str, list[int]]:
        """A chat as a prompt: its text and its token ids. Options and errors are `write`'s."""
        chat = self.write(messages, **options)
        return put_together(chat), self.tokenizer.chat_ids(chat)

    def write(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A chat as text for `Tokenizer.chat_ids`: special tokens named in messages are split up.

        add_generation_prompt: end where the model's next message begins. continue_final_message:
        leave the last message open instead. variables: the template's own, such as
        enable_thinking. Raises ValueError with the template's reason if it refuses or fails.
        """
        from transformers.utils.chat_template_utils import render_jinja_template  # takes a second

        given = variables or {}
        if given:  # looking at the signature takes as long as writing a chat
            reserved = {*inspect.signature(render_jinja_template).parameters, *_BUILT_IN}
            if taken := sorted(reserved & {*given}):
                key = f"chat_template_kwargs.{taken[0]}"
                raise ValueError(f"{key} is not one of the template's own")
        try:
            chat: str = render_jinja_template(
                [[{key: self._quoted(one[key]) for key in one} for one in messages]],
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **{**self.tokenizer.special_names, **given},
            )[0][0]
        except Exception as error:  # whatever a template's own code raises
            raise ValueError(f"the model's chat template: {error}") from None
        return chat

    def _quoted(self, value: object) -> object:
        """A value with the special tokens' names in its texts taken apart."""
        if isinstance(value, str):
            return self.tokenizer.written_names.taken_apart(value)
        if isinstance(value, Mapping):
            return {key: self._quoted(one) for key, one in value.items()}
        return [*map(self._quoted, value)] if isinstance(value, (list, tuple)) else value


@lru_cache(maxsize=2)
def _loaded(tokenizer: str, eos_token: str | None, sha256: str) -> Tokenizer:
    """Cached, as every piece of a text loads it. sha256: of its files, which may change."""
    return Tokenizer.load(tokenizer, eos_token=eos_token)
