"""Chats in OpenAI's format: completions of the prompt that the chat template renders."""

from __future__ import annotations

import asyncio
from collections import abc
from collections.abc import Iterator
from functools import partial

from gptray.config import ServeConfig
from gptray.generation.sampling import Drawn
from gptray.serving.api_error import ApiError
from gptray.serving.chat_request import ChatPrompt, ChatRequest
from gptray.serving.choices import Choice, finite
from gptray.serving.completions import Completion, check_name
from gptray.serving.endpoint import Served


class ChatCompletion(Completion):
    """A chat request and the model that answers it; its choices are messages."""

    id_prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    prompt_key = "messages"
    _has_begun = False  # streaming

    @classmethod
    async def of_chat(cls, body: ChatRequest, served: Served, limits: ServeConfig) -> Completion:
        """Check a chat against the model and the limits. Raises ApiError."""
        check_name(served, body.model)
        ids = await chat_ids(body, served)
        longest = served.engine.n_positions
        return await cls.of(body.completion(ids, longest=longest), served, limits)

    def whole(self, parts: abc.Sequence[Choice]) -> dict[str, object]:
        return {**super().whole(parts), **self._prompt_ids()}

    def whole_choice(self, choice: Choice) -> dict[str, object]:
        message = {"role": "assistant", "content": choice["text"], "refusal": None}
        return {**self._fields(choice, self._logprobs(choice)), "message": message}

    def chunks(self, choice: Choice) -> Iterator[dict[str, object]]:
        """First the roles of all choices, each in its own event, as OpenAI sends them.

        OpenAI's Python package counts log-probabilities in a choice's first event twice.
        """
        if not self._has_begun:
            self._has_begun = True
            for index in range(self.body.n):
                begin = Choice(
                    index=index,
                    text="",
                    logprobs=None,
                    finish_reason=None,
                    stop_reason=None,
                    token_ids=[],
                )
                yield {**self._chunk(self._delta(begin, role="assistant")), **self._prompt_ids()}
        yield self._chunk(self._delta(choice))

    def _delta(self, choice: Choice, **more: str) -> dict[str, object]:
        """What an event adds to a choice."""
        fields = self._fields(choice, self._logprobs(choice))
        return {**fields, "delta": {**more, "content": choice["text"]}}

    def _logprobs(self, choice: Choice) -> dict[str, object] | None:
        told = choice["logprobs"]
        return None if told is None else {"content": [self._token(one.drawn) for one in told]}

    def _token(self, drawn: Drawn) -> dict[str, object]:
        """A token of an answer, and the likeliest tokens at its position."""
        assert drawn.logprob is not None  # only the first token of an echoed prompt has none
        likeliest = [self._scored(token, logprob) for token, logprob in drawn.top]
        return {**self._scored(drawn.token, drawn.logprob), "top_logprobs": likeliest}

    def _scored(self, token: int, logprob: float) -> dict[str, object]:
        """A token and its log-probability. bytes: its text in UTF-8, maybe part of a character."""
        return {
            "token": self._name(token),
            "logprob": finite(logprob),
            "bytes": list(self._served.token_bytes(token)),
        }

    def _prompt_ids(self) -> dict[str, object]:
        """The prompt's token ids, if asked for; all choices have the same prompt."""
        asked = self.body.return_token_ids
        return {"prompt_token_ids": self._sequences[0].prompt} if asked else {}


async def chat_ids(body: ChatPrompt, served: Served) -> list[int]:
    """A chat's token ids, as the model's template writes it. Raises ApiError."""
    if served.chat is None:
        message = f"{served.name!r} has no chat template: call POST /v1/completions"
        raise ApiError(400, message, param="messages", code="no_chat_template")
    try:
        # In a thread, since the first call takes a second and a template may be slow.
        write = partial(served.chat.prompt, body.messages, **body.writing)
        _, ids = await asyncio.to_thread(write)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from None
    return ids
