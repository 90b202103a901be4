"""The choices of an answer: the prompts that they echo, then what the engine's updates add.

Logprobs cover every generated token, the end-of-text token too, though it is not part of the text.
"""

from __future__ import annotations

from collections import abc
from typing import NamedTuple, TypedDict

from gptray.generation.detokenize import REPLACEMENT, TextStream
from gptray.generation.sampling import Drawn
from gptray.generation.sequence import Sequence
from gptray.serving.endpoint import Served
from gptray.serving.protocol import CompletionRequest, Prompt
from gptray.serving.streams import Update

# Replaces a log-probability that JSON cannot hold.
LEAST_LOGPROB = -9999.0


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


class Told(NamedTuple):
    """A token of a choice, and where in the choice's text it begins."""

    drawn: Drawn
    offset: int


class Logprobs(TypedDict):
    """A list of what each token has; null for the first of a prompt."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class Choice(TypedDict):
    """What an update adds to one of the answer's choices."""

    index: int
    text: str
    logprobs: list[Told] | None
    finish_reason: str | None


class Output:
    """One choice as its updates come."""

    def __init__(
        self, index: int, prompt: Echo, sequence: Sequence, logprobs: bool, served: Served
    ) -> None:
        """prompt: as the text begins with it. sequence: that of the prompt, which it continues."""
        self._index, self._has_logprobs = index, logprobs
        self._prompt: str | None = prompt.text  # until it is told
        self._lead = list(prompt.lead)
        self._led = 0  # characters before the text that is told
        self._new: int | None = None  # where new tokens begin, until they have
        self._sequence, self._served = sequence, served
        # Tells where in the text behind the lead each token begins.
        self._told = TextStream(served.tokenizer.decode)

    def take(self, update: Update) -> Choice:
        echoed = ""
        if self._prompt is not None:
            echoed, self._prompt = self._shown(self._prompt), None
            self._new = len(echoed)
        new = [*update.drawn, *filter(None, [update.end])]
        return {
            "index": self._index,
            "text": echoed + update.text,
            "logprobs": self._logprobs(update.prompt, new) if self._has_logprobs else None,
            "finish_reason": update.finish_reason,
        }

    def _shown(self, prompt: str) -> str:
        """A prompt before its new text, which tells the character that the prompt breaks off in."""
        if not self._sequence.sampling.max_new_tokens:
            return prompt
        begun = self._served.tokenizer.decode(self._sequence.lead)
        return prompt.removesuffix(begun[len(begun.rstrip(REPLACEMENT)) :])

    def _logprobs(self, prompt: abc.Sequence[Drawn], new: abc.Sequence[Drawn]) -> list[Told]:
        told = [Told(drawn, self._offset(drawn.token)) for drawn in prompt]
        if new and self._new is not None:
            # The engine's text of them begins behind the prompt as it was written.
            self._told = TextStream(self._served.tokenizer.decode, lead=self._sequence.lead)
            self._led, self._new, self._lead = self._new, None, []
        return told + [Told(drawn, self._offset(drawn.token)) for drawn in new]

    def _offset(self, token: int) -> int:
        """Where in the text the next token begins; part of a character: where that does."""
        if self._lead:
            before = self._led
            self._led += len(self._lead.pop(0))
            return before
        before, own = len(self._told.text), self._served.token_text(token)
        self._told.add(token)
        # What was held back may have come with it.
        whole = self._told.text.endswith(own)
        return self._led + (len(self._told.text) - len(own) if whole else before)


def joined(parts: abc.Sequence[Choice]) -> Choice:
    """A choice whole, from what its updates added."""
    told = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    return {
        **parts[-1],
        "text": "".join(part["text"] for part in parts),
        "logprobs": [one for part in told for one in part] if told else None,
    }


def as_lists(told: abc.Sequence[Told], served: Served) -> Logprobs:
    """The form that completions have."""
    return {
        "text_offset": [one.offset for one in told],
        "token_logprobs": [one.drawn.logprob and finite(one.drawn.logprob) for one in told],
        "tokens": [served.token_text(one.drawn.token) for one in told],
        "top_logprobs": [_likeliest(one.drawn, served) for one in told],
    }


def _likeliest(drawn: Drawn, served: Served) -> dict[str, float] | None:
    """The likeliest tokens and the one that was drawn; of those with one text the likeliest."""
    if drawn.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in (*drawn.top, (drawn.token, drawn.logprob)):
        found.setdefault(served.token_text(token), finite(logprob))
    return found


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it."""
    return max(logprob, LEAST_LOGPROB)
