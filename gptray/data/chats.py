"""Makes documents of rows: their text, or their chat as a chat template writes it.

A chat is a list of messages, as OpenAI's `messages` ({"role", "content"}) or ShareGPT's
`conversations` ({"from", "value"}), or a `prompt` and its `completion`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

from gptray.config import UserError
from gptray.data.chat_template import ChatTemplate, text_of
from gptray.data.documents import EMPTY_ROW, Part
from gptray.data.pieces import Reading
from gptray.data.rows import kind_of, no_column
from gptray.data.tokenizer_files import KINDS

TEXT = "text"
_MESSAGES = ("messages", "conversations")
_PAIR = ("prompt", "completion")
# ShareGPT's names of roles.
_ROLES = {"human": "user", "gpt": "assistant"}
# Roles that templates know, or refuse; some skip the messages of others.
_USUAL = ("system", "user", "assistant", "tool")
# Keys of messages that call tools instead of saying something.
_CALLS = ("tool_calls", "function_call")


class NoTemplate(UserError):
    """A chat that cannot be written: the tokenizer has no template or cannot be opened."""


def text_columns(names: Collection[str], asked: str | None) -> tuple[str, ...]:
    """The columns, one or two, that hold a row's text.

    asked: data.text_column. Raises ValueError if there are none, listing the existing ones.
    """
    choices = [(TEXT,), *((name,) for name in _MESSAGES), _PAIR] if asked is None else [(asked,)]
    for columns in choices:
        if all(name in names for name in columns):
            return columns
    raise ValueError(no_column(TEXT if asked is None else asked, [*names]))


class RowReader:
    """Makes documents of rows; reads the chat template once, when the first chat needs it."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def columns(self, names: Collection[str]) -> tuple[str, ...]:
        """The `text_columns` of rows with these columns."""
        return text_columns(names, self._reading.text_column)

    def part(self, values: Sequence[object], columns: Sequence[str]) -> Part:
        """The document that a row's `columns` hold; an empty row if one holds null.

        Raises ValueError, without the row's place, for values that are neither texts nor chats.
        """
        if any(value is None for value in values):
            return EMPTY_ROW
        if all(_is_chat(value) for value in values):
            return self._chat(values, columns)
        for name, value in zip(columns, values, strict=True):
            if not isinstance(value, str):
                raise ValueError(f"column {name!r} holds {kind_of(value)}, not text")
            if self._reading.text_column is None and name in _MESSAGES:
                raise ValueError(
                    f"column {name!r} holds {kind_of(value)}, not a list of messages; "
                    f"data.text_column={name} trains on it as text"
                )
        return _part("".join(map(str, values)), columns, is_chat=False)

    def _chat(self, values: Sequence[object], columns: Sequence[str]) -> Part:
        """The document of a chat; none if it has no messages. Raises ValueError."""
        if self._template is None:
            name = self._reading.tokenizer
            whose = "a tokenizer trained here" if name in KINDS else f"the tokenizer of {name}"
            raise NoTemplate(
                f"column {columns[0]!r} holds a chat, but {whose} has no chat template to write it "
                "with; choose a model.init_from or data.tokenizer that has one, such as "
                "Qwen/Qwen3-0.6B"
            )
        messages = [
            _message(one, f"{name}[{number}]", self._template)
            for name, value in zip(columns, values, strict=True)
            if isinstance(value, list)
            for number, one in enumerate(value)
        ]
        if not messages:
            return EMPTY_ROW
        text = self._template.write(messages, add_generation_prompt=False)
        part = _part(text, columns, is_chat=True)
        for message in messages:
            role, said = message["role"], str(message["content"])
            if role not in _USUAL and said.strip() not in part.shown:
                raise ValueError(f"the chat template leaves out what the role {role!r} says")
        return part

    @cached_property
    def _template(self) -> ChatTemplate | None:
        try:
            return ChatTemplate.of(self._reading.tokenizer, eos_token=self._reading.eos_token)
        except UserError as error:
            raise NoTemplate(f"{error}") from None


def _part(text: str, columns: Sequence[str], *, is_chat: bool) -> Part:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"column {', '.join(columns)!r} holds half a surrogate pair") from None
    return Part(text, True, is_chat) if text.strip() else EMPTY_ROW


def _is_chat(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, Mapping) for one in value)


def _message(given: Mapping[str, object], place: str, template: ChatTemplate) -> dict[str, object]:
    """A message as the template takes it, with all its keys but those without a value."""
    message = {key: value for key, value in given.items() if value is not None}
    said = "content"
    if "role" not in message and "from" in message:
        name, said = message.pop("from"), "value"
        message |= {"role": _ROLES.get(str(name), name), "content": message.pop(said, None)}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{place} has no role, such as user")
    calls = [key for key in _CALLS if message.get(key)]
    for key in calls:
        if not template.reads(key):
            raise ValueError(f"{place}.{key}: the chat template does not write calls of tools")
    if content is None and calls:
        content = ""  # as templates that only look for a text expect
    return {**message, "content": text_of(content, f"{place}.{said}")}
