"""How a request's prompt is read as tokens, and shown again where the answer echoes it."""

from __future__ import annotations

from typing import NamedTuple

from gptray.serving.endpoint import Served
from gptray.serving.protocol import CompletionRequest, Prompt


class Echo(NamedTuple):
    """A prompt as an answer shows it.

    lead: what the text shows of each token that the tokenizer puts before it: its name or nothing.
    """

    text: str
    lead: tuple[str, ...] = ()


async def ids_of(prompt: Prompt, body: CompletionRequest, served: Served) -> list[int]:
    """What a prompt is read as; ids are taken as they are. Raises ValueError."""
    if not isinstance(prompt, str):
        return prompt
    return await served.prompt_ids(prompt, add_prefix=body.add_special_tokens)


def echo(prompt: Prompt, body: CompletionRequest, ids: list[int], served: Served) -> Echo:
    """A prompt as it is shown: an empty one, and ids, as what was read."""
    tokenizer = served.tokenizer
    if not prompt or not isinstance(prompt, str):
        return Echo(tokenizer.decode(ids))
    if tokenizer.begins_with_prefix(prompt):
        return Echo(prompt, tuple(tokenizer.names[number] for number in tokenizer.prefix))
    return Echo(prompt, ("",) * len(tokenizer.prefix) if body.add_special_tokens else ())
