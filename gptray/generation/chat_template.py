"""Chats: messages become a prompt by the model's own template, as transformers renders it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptray.data.tokenizer import Tokenizer

Message = Mapping[str, str]

# What a message may have beside its role and content.
_NAME = "name"
# What transformers and jinja2 give a template themselves.
_RENDERED = ("messages", "self")


def messages_of(value: object) -> list[dict[str, str]]:
    """A chat's messages, each with a role and text. Raises ValueError naming what is wrong.

    Content with several parts becomes their text, one line each. Keys that are null or empty are
    ignored.
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
    return {"role": role, "content": _text(content, f"{place}.content"), **named}


def _text(content: object, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)) or not content:
        raise ValueError(f"{place} must be text, or a list of parts of text")
    for number, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            what = f"of type {str(kind)[:60]} is not supported: this model reads text"
            raise ValueError(f"{place}[{number}] {what}")
    return "\n".join(part["text"] for part in content)


@dataclass(frozen=True)
class ChatTemplate:
    """A model's template. What a message says is never read as a special token."""

    source: str
    tokenizer: Tokenizer

    def prompt(self, messages: Sequence[Message], **options: Any) -> tuple[str, list[int]]:
        """The prompt that a chat is, as text and as token ids. options, errors: as `write`."""
        chat = self.write(messages, **options)
        return self.shown(chat), self.tokenizer.chat_ids(chat)

    def shown(self, chat: str) -> str:
        """What `write` gave, as it is read by people."""
        return self.tokenizer.written_names.put_together(chat)

    def write(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that `Tokenizer.chat_ids` reads as a chat's prompt.

        Names of special tokens inside messages are split up in it.
        add_generation_prompt: whether it ends where the model's next message begins.
        continue_final_message: whether it ends within the last message instead. variables: the
        template's own, such as enable_thinking. Raises ValueError where the template refuses or
        fails, with its reason.
        """
        from transformers.utils.chat_template_utils import render_jinja_template  # takes a second

        given = variables or {}
        taken = {*inspect.signature(render_jinja_template).parameters, *_RENDERED}
        if own := sorted(taken & {*given}):
            raise ValueError(f"chat_template_kwargs.{own[0]} is not the template's own")
        take_apart = self.tokenizer.written_names.taken_apart
        quoted = [
            {key: take_apart(value) for key, value in message.items()} for message in messages
        ]
        try:
            chat: str = render_jinja_template(
                [quoted],
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **{**self.tokenizer.special_names, **given},
            )[0][0]
        except Exception as error:  # whatever a template's own code raises
            raise ValueError(f"the model's chat template: {error}") from None
        return chat
