"""The choices of an answer: echoed prompts, then the text of the engine's updates.

Log-probabilities cover every generated token, even the end of text, which is not part of the text.
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

# What an answer calls a token.
Name = abc.Callable[[int], str]
# Replaces log-probabilities that JSON cannot represent.
LEAST_LOGPROB = -9999.0


class Echo(NamedTuple):
    """A prompt as an answer echoes it.

    lead: the text of each token that the tokenizer adds before the prompt: its name or nothing.
    """

    text: str
    lead: tuple[str, ...] = ()


async def ids_of(prompt: Prompt, body: CompletionRequest, served: Served) -> list[int]:
    """A prompt's token ids; ids are returned unchanged. Raises ValueError."""
    if not isinstance(prompt, str):
        return prompt
    return await served.prompt_ids(prompt, add_prefix=body.add_special_tokens)


def echo(prompt: Prompt, body: CompletionRequest, ids: list[int], served: Served) -> Echo:
    """A prompt as an answer echoes it; ids and an empty prompt as their decoded tokens."""
    tokenizer = served.tokenizer
    if not prompt or not isinstance(prompt, str):
        return Echo(tokenizer.decode(ids))
    if tokenizer.begins_with_prefix(prompt):
        return Echo(prompt, tuple(tokenizer.names[number] for number in tokenizer.prefix))
    return Echo(prompt, ("",) * len(tokenizer.prefix) if body.add_special_tokens else ())


class PlacedToken(NamedTuple):
    """A token of a choice, and where in the choice's text it begins."""

    drawn: Drawn
    offset: int


class Choice(TypedDict):
    """What an update adds to one of an answer's choices."""

    index: int
    text: str
    logprobs: list[PlacedToken] | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int]  # also of a token that ended the text


class Output:
    """Assembles one choice from its updates."""

    def __init__(
        self, index: int, prompt: Echo, sequence: Sequence, logprobs: bool, served: Served
    ) -> None:
        """prompt: to begin the text with. sequence: generates the continuation."""
        self._index, self._has_logprobs = index, logprobs
        self._prompt: str | None = prompt.text  # None once it is sent
        self._lead = list(prompt.lead)
        self._led = 0  # where the text of `_stream` begins in the choice's text
        self._new: int | None = None  # where new tokens begin, until the first has arrived
        self._sequence, self._served = sequence, served
        # Locates each token in the text after the lead.
        self._stream = TextStream(served.tokenizer.decode)

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
            "stop_reason": update.stop_reason,
            "token_ids": [one.token for one in new],
        }

    def _shown(self, prompt: str) -> str:
        """A prompt without a partial last character, which the new text begins with."""
        if not self._sequence.sampling.max_new_tokens:
            return prompt
        begun = self._served.tokenizer.decode(self._sequence.lead)
        return prompt.removesuffix(begun[len(begun.rstrip(REPLACEMENT)) :])

    def _logprobs(self, prompt: abc.Sequence[Drawn], new: abc.Sequence[Drawn]) -> list[PlacedToken]:
        placed = [PlacedToken(drawn, self._offset(drawn.token)) for drawn in prompt]
        if new and self._new is not None:
            # New text starts right after the prompt as written, not as decoded from its tokens.
            self._stream = TextStream(self._sequence.decode, lead=self._sequence.lead)
            self._led, self._new, self._lead = self._new, None, []
        return placed + [PlacedToken(drawn, self._offset(drawn.token)) for drawn in new]

    def _offset(self, token: int) -> int:
        """Where in the text the next token begins; for part of a character, where that begins."""
        if self._lead:
            before = self._led
            self._led += len(self._lead.pop(0))
            return before
        before, own = len(self._stream.text), self._served.token_text(token)
        self._stream.add(token)
        # The token may also release text that was held back before it.
        whole = self._stream.text.endswith(own)
        return self._led + (len(self._stream.text) - len(own) if whole else before)


def joined(parts: abc.Sequence[Choice]) -> Choice:
    """The whole choice, joined from what its updates added."""
    placed = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    return {
        **parts[-1],
        "text": "".join(part["text"] for part in parts),
        "logprobs": [one for part in placed for one in part] if placed else None,
        "token_ids": [token for part in parts for token in part["token_ids"]],
    }


def as_lists(tokens: abc.Sequence[PlacedToken], name: Name) -> dict[str, object]:
    """Log-probabilities in the format of completions; null for the first token of a prompt."""
    return {
        "text_offset": [one.offset for one in tokens],
        "token_logprobs": [one.drawn.logprob and finite(one.drawn.logprob) for one in tokens],
        "tokens": [name(one.drawn.token) for one in tokens],
        "top_logprobs": [_likeliest(one.drawn, name) for one in tokens],
    }


def _likeliest(drawn: Drawn, name: Name) -> dict[str, float] | None:
    """The likeliest tokens and the drawn one; of tokens with the same name, the likeliest."""
    if drawn.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in (*drawn.top, (drawn.token, drawn.logprob)):
        found.setdefault(name(token), finite(logprob))
    return found


def finite(logprob: float) -> float:
    """A log-probability that JSON can represent."""
    return max(logprob, LEAST_LOGPROB)
