"""Middleware around Ray Serve's HTTP proxy, in the proxy's process.

Serve finds `middlewares` by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, which a job with its own Ray
sets. The middleware puts Serve's own paths behind the application's key, turns Serve's plain-text
answers into OpenAI's format, limits the time and size of a request's headers and body, and limits
how long a client may leave an answer unread. It passes a request to Serve only when its body is
complete, since from then on it costs the proxy and a replica work.
"""

from __future__ import annotations

import asyncio
import json
import resource
from http import HTTPStatus

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gptray.jobs.serve.body_limits import body_limits
from gptray.serving.api_error import ApiError, ClientGone
from gptray.serving.arrival import Arrival

# Serve's own paths, which list the applications and say whether the proxy is up.
SERVES_PATHS = ("/-/routes", "/-/healthz")
# Serve answers these statuses in plain text, in its own terms.
ANSWERS = {
    404: "no model is served here yet",
    408: "the request took longer than serve.request_timeout_s allows",
    429: "too many requests are waiting",
    503: "no engine is ready for this request; try again",
}
# macOS says that there is no limit, but grants no more (OPEN_MAX).
MAC_FILES = 10_240
ENDED = "the engine ended before the answer was complete; try again"


def middlewares() -> list[Middleware]:
    """The middleware of Serve's proxy. Called in its process, before it listens."""
    # Each connection needs a file descriptor; many systems allow only 1,024 by default.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = MAC_FILES if most == resource.RLIM_INFINITY else most
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    HTTP_PROTOCOLS["auto"] = f"{TimedConnection.__module__}:{TimedConnection.__name__}"
    limits = body_limits()
    return [Middleware(Front, arrival=Arrival(*limits) if limits else None)]


class Front:
    """An ASGI application around Serve's proxy. arrival: reads bodies; None: Serve does."""

    def __init__(self, app: ASGIApp, *, arrival: Arrival | None) -> None:
        self._app, self._arrival = app, arrival

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] in SERVES_PATHS:  # route it to the application, like any other path
            scope = {**scope, "path": f"{scope['path']}/"}
        answer = _Answer(send)
        try:
            if self._arrival:
                receive = _with_body(await self._arrival.body(scope, receive), receive)
        except ApiError as error:
            await answer.tell(error)
            return
        except ClientGone:
            return
        try:
            await self._app(scope, receive, answer.send)
        finally:
            await answer.complete()


def _with_body(body: bytes, receive: Receive) -> Receive:
    """A `receive` that first returns a body that has been read already."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> Message:
        return messages.pop() if messages else await receive()

    return given


class _Answer:
    """Sends one answer: converts Serve's own to OpenAI's format, completes a broken one."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = self._ended = self._is_plain = self._is_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._is_stream = kind.startswith(b"text/event-stream")
            self._is_plain = message["status"] in ANSWERS and kind.startswith(b"text/plain")
            if self._is_plain:
                kept = {
                    name.decode(): value.decode()
                    for name, value in message["headers"]
                    if name.lower() == b"retry-after"
                }
                status = message["status"]
                await self.tell(ApiError(status, ANSWERS[status], headers=kept))
                return
        if self._is_plain:
            return
        self._ended = message["type"] == "http.response.body" and not message.get("more_body")
        await self._send(message)

    async def complete(self) -> None:
        """Complete an answer that Serve left unfinished because its replica is gone."""
        if self._ended:
            return
        gone = ApiError(503, ENDED)
        if not self._begun:
            await self.tell(gone)
        elif self._is_stream:
            self._ended = True
            last = f"data: {json.dumps(gone.body)}\n\n".encode()
            await self._send({"type": "http.response.body", "body": last})

    async def tell(self, error: ApiError) -> None:
        self._begun = self._ended = True
        answer = error.response()
        await self._send(
            {
                "type": "http.response.start",
                "status": answer.status_code,
                "headers": answer.raw_headers,
            }
        )
        await self._send({"type": "http.response.body", "body": answer.body})


class TimedConnection(HttpToolsProtocol):
    """A connection that closes if headers are late or too long, or the answer is not read.

    Uvicorn itself would wait forever.
    """

    headers_s, headers_bytes, unread_s = 20.0, 64 << 10, 60.0
    _stalled: asyncio.TimerHandle | None = None
    _deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        self._header_bytes += len(data)
        super().data_received(data)
        if self._deadline is None:
            self._header_bytes = 0
        elif self._header_bytes > self.headers_bytes:
            self._refuse(ApiError(431, f"the headers are longer than {self.headers_bytes:,} bytes"))

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_headers()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        self._stalled = self.loop.call_later(self.unread_s, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(self.headers_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._expect_headers()  # of a pipelined request, while the previous one is answered
            return
        self._refuse(ApiError(408, f"the headers did not arrive within {self.headers_s:g} s"))

    def _refuse(self, error: ApiError) -> None:
        self._stop_waiting()
        if self.transport.is_closing():
            return
        if not self._header_bytes:  # an unused connection, which browsers keep in reserve
            self.transport.close()
            return
        answer = error.response()
        head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", "connection: close"]
        head += [f"{name.decode()}: {value.decode()}" for name, value in answer.raw_headers]
        self.transport.write("\r\n".join([*head, "", ""]).encode() + answer.body)
        self.transport.close()
