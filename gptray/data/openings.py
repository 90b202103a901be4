"""Takes prompts from the text itself: the first words of two validation documents, or a chat."""

from __future__ import annotations

import re
from typing import NamedTuple

from gptray.data.chat_template import ChatTemplate
from gptray.data.tokens import TokenData

# The most words and characters in a prompt, and the tokens to take them from.
WORDS, CHARACTERS, TOKENS = 4, 24, 256
# A line that begins with a word, not with the markup of a list, a table or code.
_WORD = re.compile(r"^[^\W\d_]{2}", re.MULTILINE)
# The most characters in a chat's opening; a model folder keeps no longer example.
_CHAT_CHARACTERS = 1000
# What the user says if the text begins with no chat that is so short.
_HELLO = ({"role": "user", "content": "Hello"},)


class Opening(NamedTuple):
    """A prompt, and whether it names special tokens (see `Tokenizer.prompt_ids`)."""

    prompt: str
    parse_special: bool = False


def openings(data: TokenData) -> list[Opening]:
    """Prompts that suit the text: a chat up to its first answer, if most documents are chats."""
    if data.is_of_chats:
        return [Opening(prompt, parse_special=True) for prompt in _until_answer(data)]
    return [Opening(prompt) for prompt in first_words(data)]


def _until_answer(data: TokenData) -> list[str]:
    template = ChatTemplate.of(str(data.data_dir / "tokenizer"), eos_token=None)
    assert template
    try:
        asked = template.write(_HELLO)
        answering = asked.removeprefix(template.write(_HELLO, add_generation_prompt=False))
    except ValueError:
        return []  # it refuses a chat this simple
    if answering in ("", asked):
        return [asked]
    text = data.tokenizer.decode(data.val.slice(0, min(TOKENS, len(data.val))).tolist())
    before, found, _ = text.partition(answering)
    prompt = before + answering
    return [prompt if found and len(prompt) <= _CHAT_CHARACTERS else asked]


def first_words(data: TokenData) -> list[str]:
    """The first words of two validation documents, which the model does not train on.

    If there is only one, which the split may have cut anywhere, the first words of one of its
    lines, if possible of one that begins with a word.
    """
    middle = len(data.val) // 2
    ends = (data.val.slice(middle, min(len(data.val), middle + 50_000)) == data.eos_id).nonzero()[0]
    after = middle + int(ends[0]) + 1 if len(ends) else len(data.val)
    begins = [_text(data, begin) for begin in (0, after) if begin < len(data.val)]
    if len(begins) == 1:
        lines = begins[0].partition("\n")[2].lstrip() or begins[0]
        word = _WORD.search(lines)
        begins = [lines[word.start() :] if word else lines]
    return [prompt for text in begins if (prompt := _few_words(text))]


def _text(data: TokenData, begin: int) -> str:
    """The validation text from a position up to the end of its document."""
    ids = data.val.slice(begin, min(begin + TOKENS, len(data.val))).tolist()
    if data.eos_id in ids:
        ids = ids[: ids.index(data.eos_id)]
    text = [number for number in ids if number not in data.val.document_prefix]
    return data.tokenizer.decode(text).replace("\ufffd", "")


def _few_words(text: str) -> str:
    """The first words of the first line, but not all of a text, so that something is left."""
    line, _, rest = text.strip().partition("\n")
    words = line.rstrip().split(" ")
    prompt = words[0][:CHARACTERS]
    for word in words[1 : min(WORDS, len(words) if rest else len(words) - 1)]:
        if len(prompt) + 1 + len(word) > CHARACTERS:
            break
        prompt += f" {word}"
    return prompt.rstrip()
