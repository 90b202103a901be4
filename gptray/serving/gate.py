"""Before every route: the API key, and whether the server stops; after it: the count."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi.datastructures import Headers
from fastapi.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptray.serving.endpoint import Endpoint
from gptray.serving.errors import ApiError
from gptray.serving.keys import lets_in
from gptray.serving.telemetry import Telemetry

OPEN_PATHS = ("/health",)
# What is answered while running requests finish.
DRAINING_PATHS = ("/metrics",)


class Gate:
    """An ASGI application around another one.

    keys: digests of the keys that let in, none for everybody. page: what a browser without a key
    gets, to ask for it. paths: those that are counted each by its own name.
    """

    def __init__(
        self,
        app: ASGIApp,
        endpoint: Endpoint,
        telemetry: Telemetry,
        *,
        keys: Sequence[str],
        page: str,
        paths: Sequence[str],
    ) -> None:
        self._app, self._endpoint, self._telemetry = app, endpoint, telemetry
        self._keys, self._page, self._paths = tuple(keys), page, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # as nginx calls an answer that nobody waited for

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await (self._refusal(scope) or self._app)(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._telemetry.requests.labels(path, status).inc()

    def _refusal(self, scope: Scope) -> Response | None:
        path, headers = scope["path"], Headers(scope=scope)
        if path not in OPEN_PATHS and not lets_in(self._keys, headers.get("authorization", "")):
            if path == "/":
                return HTMLResponse(self._page, 401)
            message = "a key is needed, as Authorization: Bearer <key>"
            return ApiError(401, message, code="invalid_api_key").response()
        if self._endpoint.draining and path not in DRAINING_PATHS:
            return ApiError(
                503, "the server is stopping", headers={"Connection": "close"}
            ).response()
        return None
