"""Chats in OpenAI's format: completions of the prompt that the chat template renders."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial

from gptray.config import ServeConfig
from gptray.generation.sampling import Drawn
from gptray.serving.api_error import ApiError
from gptray.serving.chat_request import ChatRequest
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
        if served.chat is None:
            message = f"{served.name!r} has no chat template: call POST /v1/completions"
            raise ApiError(400, message, param="messages", code="no_chat_template")
        try:
            ids = await _prompt_ids(body, served)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        longest = served.engine.n_positions
        return await cls.of(body.completion(ids, longest=longest), served, limits)

    def whole_choice(self, choice: Choice) -> dict[str, object]:
        message = {"role": "assistant", "content": choice["text"], "refusal": None}
        return {**self._fields(choice), "message": message}

    def chunks(self, choice: Choice) -> Iterator[dict[str, object]]:
        """First the roles of all choices, each in its own event, as OpenAI sends them.

        OpenAI's Python package counts log-probabilities in a choice's first event twice.
        """
        if not self._has_begun:
            self._has_begun = True
            for index in range(self.body.n):
                begin = Choice(index=index, text="", logprobs=None, finish_reason=None)
                yield self._chunk(self._delta(begin, role="assistant"))
        yield self._chunk(self._delta(choice))

    def _delta(self, choice: Choice, **more: str) -> dict[str, object]:
        """What an event adds to a choice."""
        return {**self._fields(choice), "delta": {**more, "content": choice["text"]}}

    def _fields(self, choice: Choice) -> dict[str, object]:
        """The fields of a choice other than its text."""
        told = choice["logprobs"]
        logprobs = None
        if told is not None:
            logprobs = {"content": [_token_logprob(one.drawn, self._served) for one in told]}
        return {
            "index": choice["index"],
            "logprobs": logprobs,
            "finish_reason": choice["finish_reason"],
        }


async def _prompt_ids(body: ChatRequest, served: Served) -> list[int]:
    """The prompt as the model's template renders it. Raises ValueError."""
    assert served.chat is not None
    render = partial(served.chat.prompt, body.messages, **body.writing)
    # In a thread, since the first call takes a second and a template may be slow.
    _, ids = await asyncio.to_thread(render)
    return ids


def _token_logprob(drawn: Drawn, served: Served) -> dict[str, object]:
    """A token of an answer, and the likeliest tokens at its position."""
    likeliest = [_of_token(token, logprob, served) for token, logprob in drawn.top]
    assert drawn.logprob is not None  # only the first token of an echoed prompt has none
    return {**_of_token(drawn.token, drawn.logprob, served), "top_logprobs": likeliest}


def _of_token(token: int, logprob: float, served: Served) -> dict[str, object]:
    """A token and its log-probability. bytes: its text in UTF-8, maybe part of a character."""
    return {
        "token": served.token_text(token),
        "logprob": finite(logprob),
        "bytes": list(served.token_bytes(token)),
    }
