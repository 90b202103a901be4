"""Completions as server-sent events, and exceptions as error responses."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gptray.config import UserError
from gptray.serving.api_error import ApiError
from gptray.serving.choices import Choice
from gptray.serving.completions import Completion
from gptray.serving.engine_thread import Overloaded
from gptray.serving.streams import EngineStopped

# Sent at once, so that clients and proxies with a timeout for the first byte do not give up.
ACCEPTED = ": accepted\n\n"


class EventStream(StreamingResponse):
    """A streamed answer. However it ends, it closes its generators, then its resources."""

    def __init__(
        self, completion: Completion, parts: AsyncGenerator[Choice, None], resources: ExitStack
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self._events, self._resources = _events(completion, parts), resources
        super().__init__(self._events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._resources:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)


async def _events(
    completion: Completion, parts: AsyncGenerator[Choice, None]
) -> AsyncGenerator[str, None]:
    """The answer as events. A failure becomes the last event, since the status is already sent."""
    async with aclosing(parts):
        try:
            yield ACCEPTED
            async for part in parts:
                for chunk in completion.chunks(part):
                    yield _event(chunk)
            for chunk in completion.last_chunks():
                yield _event(chunk)
            yield "data: [DONE]\n\n"
        except (ApiError, EngineStopped, TimeoutError) as error:
            yield _event(as_api_error(error).body)


def _event(content: dict[str, object]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


def as_api_error(error: Exception) -> ApiError:
    """The error response for an exception."""
    match error:
        case ApiError():
            return error
        case UserError():
            return ApiError(400, str(error))
        case Overloaded():
            wait = {"Retry-After": str(error.retry_after_s)}
            return ApiError(429, str(error), code="overloaded", headers=wait)
        case EngineStopped():
            return ApiError(503, str(error))
        case TimeoutError():
            return ApiError(408, "the request took longer than serve.request_timeout_s allows")
        case _:
            return ApiError(500, "something went wrong inside the server")
