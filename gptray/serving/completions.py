"""Turns a completion request into the engine's sequences, and their output into the answer.

Outputs are independent draws. With a seed, choice i draws from row i of that seed, so the first is
the text that `jobs/generate.py` generates; without one, each prompt gets a fresh seed.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections import abc, defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing
from dataclasses import replace
from typing import Self

from gptray.config import ServeConfig
from gptray.config.limits import SEEDS
from gptray.generation.sequence import Sequence
from gptray.generation.settings import PromptTooLong, Sampling
from gptray.serving.api_error import ApiError
from gptray.serving.choices import Choice, Echo, Name, Output, as_lists, echo, ids_of, joined
from gptray.serving.endpoint import Served, token_id_name
from gptray.serving.protocol import SAMPLED, CompletionRequest, StreamOptions, key_of
from gptray.serving.streams import Stream, Update

# The most models that an error message lists.
MAX_LISTED = 10


class Completion:
    """A completion request and the model that answers it: the sequences and their outputs."""

    id_prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"
    prompt_key = "prompt"  # the request's key, for error messages

    def __init__(
        self,
        body: CompletionRequest,
        served: Served,
        prompts: list[Echo],
        sequences: list[Sequence],
    ) -> None:
        """sequences: checked, `body.n` for each prompt."""
        self.id, self.created = f"{self.id_prefix}{uuid.uuid4().hex}", int(time.time())
        self.body, self._served = body, served
        self._options = body.stream_options or StreamOptions()
        self._sequences = sequences
        echoed = prompts if body.echo else [Echo("") for _ in prompts]
        self._outputs = [
            Output(index, echoed[index // body.n], one, body.logprobs is not None, served)
            for index, one in enumerate(sequences)
        ]
        self.prompt_tokens = sum(one.prompt_tokens for one in sequences[:: body.n])
        self.completion_tokens = 0
        self._name: Name = token_id_name if body.return_tokens_as_token_ids else served.token_text
        self._told = set[int]()  # the choices whose prompt's ids are sent

    @classmethod
    async def of(cls, body: CompletionRequest, served: Served, limits: ServeConfig) -> Self:
        """Check a request against the model and the limits. Raises ApiError."""
        _check_limits(body, served, limits)
        sampling = _sampling(body, served, limits)
        prompts: list[Echo] = []
        sequences: list[Sequence] = []
        for number, prompt in enumerate(body.prompt):
            place = f"prompt {number + 1}: " if len(body.prompt) > 1 else ""
            try:
                whole = await ids_of(prompt, body, served)
                ids = served.tokenizer.last_ids(whole, body.truncate_prompt_tokens or len(whole))
                outputs = _outputs_of(body, sampling, ids, number)
                for sequence in outputs:
                    sequence.adapter = served.adapter
                    served.engine.check(sequence)
            except ValueError as error:
                is_long = isinstance(error, PromptTooLong)
                raise ApiError(
                    400,
                    f"{place}{error}",
                    param=key_of(str(error), CompletionRequest.model_fields) or cls.prompt_key,
                    code="context_length_exceeded" if is_long else None,
                ) from None
            prompts.append(echo(prompt if ids == whole else ids, body, ids, served))
            sequences += outputs
            await asyncio.sleep(0)  # lets other requests run between many prompts
        return cls(body, served, prompts, sequences)

    def accept(self, limits: ServeConfig) -> AbstractContextManager[Stream]:
        """Queue the outputs in the engine. Raises like `EngineThread.accept`."""
        at_once = limits.max_prompts * self.body.n
        return self._served.thread.accept(self._sequences, at_once=at_once)

    async def run(
        self, stream: Stream, deadline: float, seen: Callable[[Update], None]
    ) -> AsyncGenerator[Choice, None]:
        """Yield what each update adds to its choice. Raises EngineStopped, ApiError, TimeoutError.

        deadline: on the event loop's clock. seen: called with every update.
        """
        async with aclosing(stream.updates()) as updates:
            while True:
                async with asyncio.timeout_at(deadline):
                    update = await anext(updates, None)
                if update is None:
                    return
                if update.error is not None:
                    raise ApiError(500, update.error)
                self.completion_tokens += len(update.drawn) + (update.end is not None)
                seen(update)
                yield self._outputs[update.index].take(update)

    def whole(self, parts: abc.Sequence[Choice]) -> dict[str, object]:
        """The whole answer, from all that `run` yielded."""
        of_choice = defaultdict(list)
        for part in parts:
            of_choice[part["index"]].append(part)
        whole = (joined(of_choice[index]) for index in range(len(self._sequences)))
        choices = [self.whole_choice(choice) for choice in whole]
        return {**self._head(self.kind), "choices": choices, "usage": self.usage()}

    def chunks(self, choice: Choice) -> Iterator[dict[str, object]]:
        """The events of a stream for what an update added to a choice."""
        yield self._chunk(self.whole_choice(choice))

    def _chunk(self, choice: Mapping[str, object]) -> dict[str, object]:
        chunk = {**self._head(self.chunk_kind), "choices": [choice]}
        if self._options.include_usage:
            chunk["usage"] = self.usage() if self._options.continuous_usage_stats else None
        return chunk

    def last_chunks(self) -> Iterator[dict[str, object]]:
        """The events after the end of the last choice."""
        if self._options.include_usage:
            yield {**self._head(self.chunk_kind), "choices": [], "usage": self.usage()}

    def whole_choice(self, choice: Choice) -> dict[str, object]:
        """A choice in the format of a whole answer."""
        tokens = choice["logprobs"]
        logprobs = None if tokens is None else as_lists(tokens, self._name)
        whole = {"text": choice["text"], **self._fields(choice, logprobs)}
        if self.body.return_token_ids and choice["index"] not in self._told:
            self._told.add(choice["index"])
            whole["prompt_token_ids"] = self._sequences[choice["index"]].prompt
        return whole

    def _fields(self, choice: Choice, logprobs: object) -> dict[str, object]:
        """The fields that completions and chats share."""
        ids = {"token_ids": choice["token_ids"]} if self.body.return_token_ids else {}
        return {
            "index": choice["index"],
            "logprobs": logprobs,
            "finish_reason": choice["finish_reason"],
            "stop_reason": choice["stop_reason"],
            **ids,
        }

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self._served.name}


def check_name(served: Served, name: str | None) -> None:
    """Raise ApiError(404) if `name` is not that of `served`."""
    if name is None or name == served.name:
        return
    names = [one.name for one in served.all]
    known = ", ".join(names[:MAX_LISTED])
    if len(names) > MAX_LISTED:
        known += f" and {len(names) - MAX_LISTED:,} more (GET /v1/models)"
    message = f"The model `{name[:100]}` does not exist. Served here: {known}."
    raise ApiError(404, message, param="model", code="model_not_found")


def _check_limits(body: CompletionRequest, served: Served, limits: ServeConfig) -> None:
    check_name(served, body.model)
    for key, given, most in (
        ("n", body.n, limits.max_n),
        ("stop", len(body.stop), limits.max_stop),
        ("stop_token_ids", len(body.stop_token_ids), limits.max_stop),
        ("logprobs", body.logprobs or 0, limits.max_logprobs),
    ):
        if given > most:
            what = f"{key} has {given} entries" if "stop" in key else f"{key}={given}"
            raise ApiError(400, f"{what}, more than {most}", param=key)
    outputs, most = len(body.prompt) * body.n, limits.max_outputs
    if outputs > most:
        raise ApiError(
            400,
            f"prompts x n = {outputs} outputs, more than {most} (serve.max_outputs); split them "
            "into several requests",
            param="prompt",
        )


def _outputs_of(
    body: CompletionRequest, sampling: Sampling, ids: list[int], number: int
) -> list[Sequence]:
    """The sequences of prompt `number`, each with its own row of the seed."""
    scored = body.logprobs if body.echo else None
    if body.max_tokens == 0:
        scored = scored or 0
    first = number * body.n
    if body.seed is None:
        sampling, first = replace(sampling, seed=secrets.randbelow(SEEDS)), 0
    return [
        Sequence(ids, sampling, row, live_text=body.stream, prompt_logprobs=scored)
        for row in range(first, first + body.n)
    ]


def _sampling(body: CompletionRequest, served: Served, limits: ServeConfig) -> Sampling:
    longest = body.max_tokens
    if limits.max_output_tokens is not None:
        longest = min(longest, limits.max_output_tokens)
    return Sampling(
        max_new_tokens=longest,
        min_new_tokens=min(body.min_tokens, longest),
        top_k=body.top_k if body.top_k > 0 else None,
        utf8=served.utf8,
        seed=body.seed or 0,
        **{name: getattr(body, name) for name in SAMPLED},
    )
