"""Checks every request's Host and API key, refuses it while draining, and counts the answers."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi.datastructures import Headers
from fastapi.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptray.config import ServeConfig
from gptray.serving.api_error import ApiError
from gptray.serving.api_keys import Keys
from gptray.serving.endpoint import Endpoint
from gptray.serving.hosts import Hosts
from gptray.serving.telemetry import Telemetry

OPEN_PATHS = ("/health",)
# Paths that still answer while draining.
DRAINING_PATHS = ("/metrics",)


class Gate:
    """An ASGI application around another one.

    keys: the accepted API keys; None accepts everybody. page: the HTML that asks a browser for a
    key. paths: those counted by name.
    """

    def __init__(
        self,
        app: ASGIApp,
        endpoint: Endpoint,
        limits: ServeConfig,
        telemetry: Telemetry,
        *,
        keys: Keys | None,
        page: str,
        paths: Sequence[str],
    ) -> None:
        self._app, self._endpoint, self._telemetry = app, endpoint, telemetry
        self._hosts = Hosts(limits.host, limits.allowed_hosts)
        self._keys, self._page, self._paths = keys, page, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A slash too many, as by a base URL that ends in one, would need a redirect, and behind a
        # proxy only the client knows the address that this should have.
        scope = {**scope, "path": f"/{scope['path'].strip('/')}"}
        status = 499  # nginx's status for a client that closed the connection

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
        host = headers.get("host", "")
        if not self._hosts.include(host):
            message = f"the Host {host[:100]!r} is not allowed here; see serve.allowed_hosts"
            return ApiError(421, message, code="host_not_allowed").response()
        key = headers.get("authorization", "")
        if path not in OPEN_PATHS and self._keys and not self._keys.accept(key):
            scheme = {"WWW-Authenticate": "Bearer"}
            if path == "/":
                return HTMLResponse(self._page, 401, headers=scheme)
            is_wrong = key.lower().startswith("bearer ")
            required = "an API key is required: Authorization: Bearer <key>"
            message = "the API key is incorrect" if is_wrong else required
            return ApiError(401, message, code="invalid_api_key", headers=scheme).response()
        if self._endpoint.draining and path not in DRAINING_PATHS:
            return ApiError(
                503, "the server is stopping", headers={"Connection": "close"}
            ).response()
        return None
