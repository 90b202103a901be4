"""Receives request bodies within limits of time and size, for each and for all together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from gptray.serving.api_error import ApiError, ClientGone

# This many bodies of the largest size may arrive at a time; small ones always may.
LARGEST_AT_ONCE, SMALL = 64, 16 << 10
# If an answer is sent before the body's end, the connection cannot be reused.
CLOSE = {"Connection": "close"}


class Arrival:
    """Reads one server's bodies, each of at most `max_bytes` and arriving within `timeout_s`."""

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._held = 0  # bytes of bodies that are still arriving

    async def body(self, scope: Scope, receive: Receive) -> bytes:
        """A request's whole body.

        Raises ApiError (408, 413 or 503), or ClientGone if the client disconnects before its end.
        """
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            raise self._too_long()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._read(receive)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not arrive within {self._timeout_s:g} s (serve.body_timeout_s)",
                headers=CLOSE,
            ) from None

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        try:
            async for part in _parts(receive):
                body += part
                self._held += len(part)
                if len(body) > self._max_bytes:
                    raise self._too_long()
                if len(body) > SMALL and self._held > LARGEST_AT_ONCE * self._max_bytes:
                    message = "too many large bodies are arriving; try again"
                    raise ApiError(503, message, headers=CLOSE)
        finally:
            self._held -= len(body)
        return bytes(body)

    def _too_long(self) -> ApiError:
        message = f"the body is longer than {self._max_bytes:,} bytes (serve.max_body_bytes)"
        return ApiError(413, message, headers=CLOSE)


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    """The parts of a body as they arrive. Raises ClientGone."""
    has_more = True
    while has_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        has_more = message.get("more_body", False)
