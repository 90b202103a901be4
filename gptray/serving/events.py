"""A completion as Server-Sent Events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gptray.serving.completions import Choice, Completion
from gptray.serving.errors import ApiError
from gptray.serving.streams import EngineStopped
from gptray.serving.told import told

# Comes at once: clients and proxies that limit the wait for an answer see that there is one.
ACCEPTED = ": accepted\n\n"


class EventStream(StreamingResponse):
    """The answer to a stream; however it ends, what makes it is closed, then what it stands on."""

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
    """The answer as events. A failure becomes the last one: the status was sent long ago."""
    async with aclosing(parts):
        try:
            yield ACCEPTED
            async for part in parts:
                yield event(completion.chunk(part))
            for chunk in completion.last_chunks():
                yield event(chunk)
            yield "data: [DONE]\n\n"
        except (ApiError, EngineStopped, TimeoutError) as error:
            yield event(told(error).body)


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
