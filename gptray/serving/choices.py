"""The choices of an answer: the prompts that they echo, then what the engine's updates add.

Logprobs cover every generated token, the end-of-text token too, though it is not part of the text.
"""

from __future__ import annotations

from collections import abc
from typing import NamedTuple, TypedDict

from gptray.generation.detokenize import TextStream, left_context
from gptray.generation.sampling import Drawn
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


class Logprobs(TypedDict):
    """A list of what each token has; null for the first of a prompt."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float | None] | None]


class Choice(TypedDict):
    """What an update adds to one of the answer's choices."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None


class Output:
    """One choice as its updates come."""

    def __init__(
        self, index: int, prompt: Echo, ids: abc.Sequence[int], logprobs: bool, served: Served
    ) -> None:
        """prompt: as the text begins with it. ids: those of the prompt, which it continues."""
        self._index, self._has_logprobs = index, logprobs
        self._echoed, self._lead = prompt.text, list(prompt.lead)
        self._led = 0  # characters before the text that is told
        self._new: int | None = len(prompt.text)  # where new tokens begin, until they have
        self._ids, self._served = ids, served
        # Tells where in the text behind the lead each token begins.
        self._told = TextStream(served.tokenizer.decode)

    def take(self, update: Update) -> Choice:
        echoed, self._echoed = self._echoed, ""
        logprobs = None
        if self._has_logprobs:
            logprobs = self._logprobs(update.prompt, [*update.drawn, *filter(None, [update.end])])
        return {
            "index": self._index,
            "text": echoed + update.text,
            "logprobs": logprobs,
            "finish_reason": update.finish_reason,
        }

    def _logprobs(self, prompt: abc.Sequence[Drawn], new: abc.Sequence[Drawn]) -> Logprobs:
        told: Logprobs = {
            "text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": [],
        }  # fmt: skip
        for number, drawn in enumerate((*prompt, *new)):
            if number == len(prompt) and self._new is not None:
                # The engine's text of them begins behind the prompt as it was written.
                tokenizer = self._served.tokenizer
                lead = left_context(tokenizer, self._ids)
                self._told = TextStream(tokenizer.decode, lead=lead)
                self._led, self._new, self._lead = self._new, None, []
            told["tokens"].append(self._served.token_text(drawn.token))
            told["token_logprobs"].append(_finite(drawn.logprob))
            told["top_logprobs"].append(self._likeliest(drawn))
            told["text_offset"].append(self._offset(drawn.token))
        return told

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

    def _likeliest(self, drawn: Drawn) -> dict[str, float | None] | None:
        if drawn.logprob is None:
            return None
        found: dict[str, float | None] = {}
        for token, logprob in (*drawn.top, (drawn.token, drawn.logprob)):
            found.setdefault(self._served.token_text(token), _finite(logprob))
        return found


def joined(parts: abc.Sequence[Choice]) -> Choice:
    """A choice whole, from what its updates added."""
    last = parts[-1]
    told = [part["logprobs"] for part in parts if part["logprobs"]]
    logprobs: Logprobs | None = last["logprobs"] and {
        "text_offset": [one for part in told for one in part["text_offset"]],
        "token_logprobs": [one for part in told for one in part["token_logprobs"]],
        "tokens": [one for part in told for one in part["tokens"]],
        "top_logprobs": [one for part in told for one in part["top_logprobs"]],
    }
    return {**last, "text": "".join(part["text"] for part in parts), "logprobs": logprobs}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
