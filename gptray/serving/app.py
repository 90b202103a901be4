"""The routes: OpenAI's completions and chats, models, tokenizing, health, metrics and the web page.

`make_app` returns an ASGI application that any server can run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from gptray import __version__
from gptray.config import ServeConfig, UserError
from gptray.config.suggest import did_you_mean, nearest
from gptray.serving.api_error import ApiError, ClientGone
from gptray.serving.api_keys import Keys
from gptray.serving.arrival import Arrival
from gptray.serving.body import read_json
from gptray.serving.chat import ChatCompletion, chat_ids
from gptray.serving.chat_request import ChatRequest, TokenizeChatRequest
from gptray.serving.completions import Completion, check_name
from gptray.serving.endpoint import Endpoint, Served
from gptray.serving.engine_thread import Overloaded
from gptray.serving.events import EventStream, as_api_error
from gptray.serving.gate import Gate
from gptray.serving.protocol import (
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
    parse_request,
)
from gptray.serving.streams import EngineStopped
from gptray.serving.telemetry import Stopwatch, Telemetry

INSTEAD = "call POST /v1/completions, with `prompt`"
# What to answer to calls of other APIs, by the end of the path.
UNSUPPORTED = {
    "/messages": "there is no such API here: call POST /v1/chat/completions, with `messages`",
    "/responses": f"there is no responses API here: {INSTEAD} instead of `input`, or POST "
    "/v1/chat/completions, with `messages`",
    "/embeddings": "embeddings are not supported; to complete text, call POST /v1/completions",
}
# How many of the likeliest tokens the page shows, if the server returns as many.
CANDIDATES = 8
T = TypeVar("T")
Asked = TypeVar("Asked", bound=GenerationRequest)
Check = Callable[[Asked, Served, ServeConfig], Coroutine[object, object, Completion]]
Body = TypeVar("Body", bound=BaseModel)


def make_app(
    endpoint: Endpoint,
    limits: ServeConfig,
    *,
    keys: Keys | None = None,
    telemetry: Telemetry | None = None,
    metrics: Callable[[], Awaitable[bytes]] | None = None,
) -> ASGIApp:
    """The application over an endpoint.

    keys: the accepted API keys; None accepts everybody. telemetry: the counters, if the caller also
    reads them. metrics: returns the text of /metrics, if not just this server's own counters.
    """
    counters, html = telemetry or Telemetry(endpoint), page(limits.max_logprobs)
    routes = _Routes(endpoint, limits, counters, html)
    api = FastAPI(openapi_url=None)

    async def metrics_route() -> Response:
        text = await metrics() if metrics else counters.text()
        return Response(text, media_type="text/plain; version=0.0.4")

    for method, path, route in (
        ("GET", "/", routes.page),
        ("GET", "/health", routes.health),
        ("GET", "/version", routes.version),
        ("GET", "/metrics", metrics_route),
        ("GET", "/v1/models", routes.models),
        ("GET", "/v1/models/{name:path}", routes.model),
        ("POST", "/v1/completions", routes.completions),
        ("POST", "/v1/chat/completions", routes.chat),
        ("POST", "/tokenize", routes.tokenize),
        ("POST", "/detokenize", routes.detokenize),
        ("GET", "/tokenizer_info", routes.tokenizer_info),
    ):
        methods = ["GET", "HEAD"] if method == "GET" else [method]
        api.add_api_route(path, route, methods=methods, response_model=None)
    paths = [route.path for route in api.routes if isinstance(route, APIRoute)]

    async def no_route(request: Request, _: Exception) -> Response:
        return ApiError(404, no_path(request.url.path, paths)).response()

    async def no_method(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # starlette's, with the allowed methods
        instead = f"; to complete text, {INSTEAD}" if request.method == "POST" else ""
        message = f"{request.url.path} does not take {request.method}{instead}"
        return ApiError(405, message, headers=error.headers).response()

    api.add_exception_handler(404, no_route)
    api.add_exception_handler(405, no_method)
    for kind in (ApiError, ClientGone, UserError, Overloaded, EngineStopped, TimeoutError):
        api.add_exception_handler(kind, _answer)
    api.add_exception_handler(Exception, _answer)  # the server logs it after the answer
    gate = Gate(api, endpoint, limits, counters, keys=keys, page=html, paths=paths)
    return gate if limits.allowed_origins is None else _cors(gate, limits.allowed_origins)


def _cors(app: ASGIApp, origins: str | list[str]) -> ASGIApp:
    """Allow calls from pages of these origins; a browser's preflight request needs no key."""
    return CORSMiddleware(
        app,
        allow_origins=[origins] if isinstance(origins, str) else origins,
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
    )


class _Routes:
    """The handler of each path."""

    def __init__(
        self, endpoint: Endpoint, limits: ServeConfig, telemetry: Telemetry, html: str
    ) -> None:
        self._endpoint, self._limits, self._telemetry = endpoint, limits, telemetry
        self._html = html
        self._arrival = Arrival(limits.max_body_bytes, limits.body_timeout_s)

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, CompletionRequest, Completion.of)

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, ChatRequest, ChatCompletion.of_chat)

    async def _complete(self, request: Request, kind: type[Asked], check: Check[Asked]) -> Response:
        deadline = asyncio.get_running_loop().time() + self._limits.request_timeout_s
        watch = Stopwatch(self._telemetry)
        body = await self._body(request, kind)
        with ExitStack() as stack:
            served = stack.enter_context(self._endpoint.using(body.model))
            completion = await check(body, served, self._limits)
            accepted = stack.enter_context(completion.accept(self._limits))
            self._telemetry.tokens_in.inc(completion.prompt_tokens)
            parts = completion.run(accepted, deadline, watch.take)
            if body.stream:
                return EventStream(completion, parts, stack.pop_all())
            whole = await _unless_gone(request, _all(parts))
            return JSONResponse(completion.whole(whole))

    async def tokenize(self, request: Request) -> Response:
        given = await read_json(request, self._arrival)
        body: TokenizeRequest | TokenizeChatRequest
        if given.get("messages") is None:
            body = parse_request(TokenizeRequest, given)
        else:
            body = parse_request(TokenizeChatRequest, given)
        with self._endpoint.using(body.model) as served:
            check_name(served, body.model)
            if isinstance(body, TokenizeRequest):
                tokens = await _text_ids(body, served)
            else:
                tokens = await chat_ids(body, served)
            answer = {
                "count": len(tokens),
                "max_model_len": served.engine.n_positions,
                "tokens": tokens,
                "token_strs": None,
            }
            if body.return_token_strs:
                answer["token_strs"] = [served.token_text(token) for token in tokens]
            return JSONResponse(answer)

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request, DetokenizeRequest)
        with self._endpoint.using(body.model) as served:
            check_name(served, body.model)
            last = served.engine.vocab_size - 1
            if not all(0 <= token <= last for token in body.tokens):
                raise ApiError(400, f"tokens holds an id outside 0 .. {last}", param="tokens")
            return JSONResponse({"prompt": served.tokenizer.decode(body.tokens)})

    async def tokenizer_info(self) -> Response:
        with self._endpoint.using() as served:
            return JSONResponse(
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "bos_token": served.tokenizer.prefix_name or None,
                    "eos_token": served.tokenizer.eos_token,
                    "pad_token": None,
                }
            )

    async def models(self) -> Response:
        with self._endpoint.using() as served:
            return JSONResponse({"object": "list", "data": [_card(one) for one in served.all]})

    async def model(self, name: str) -> Response:
        with self._endpoint.using(name) as served:
            check_name(served, name)
            return JSONResponse(_card(served))

    async def health(self) -> Response:
        if not await self._endpoint.healthy():
            raise ApiError(503, "the engine is not generating")
        return JSONResponse({"status": "ok"})

    async def version(self) -> Response:
        return JSONResponse({"version": __version__})

    async def page(self) -> Response:
        return HTMLResponse(self._html)

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        return parse_request(kind, await read_json(request, self._arrival))


async def _text_ids(body: TokenizeRequest, served: Served) -> list[int]:
    add, tokenizer = body.add_special_tokens, served.tokenizer
    # Clients look up the id of /tokenizer_info's eos_token this way.
    if body.prompt == tokenizer.eos_token:
        return [tokenizer.eos_id]
    if body.prompt:
        return await served.prompt_ids(body.prompt, add_prefix=add)
    return tokenizer.prefix if add else []


async def _all(parts: AsyncGenerator[T, None]) -> list[T]:
    async with aclosing(parts):
        return [part async for part in parts]


async def _unless_gone(request: Request, work: Coroutine[object, object, T]) -> T:
    """The result of `work`. If the client disconnects first, cancels it and raises ClientGone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _card(served: Served) -> dict[str, object]:
    example = {"example_prompt": served.example_prompt} if served.example_prompt else {}
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "gptray",
        "max_model_len": served.engine.n_positions,
        **example,
    }


async def _answer(_: Request, error: Exception) -> Response:
    if isinstance(error, ClientGone):
        return Response(status_code=499)
    return as_api_error(error).response()


def no_path(path: str, paths: Sequence[str]) -> str:
    """The error message for a path that is not in `paths`."""
    for end, sentence in UNSUPPORTED.items():
        if path.rstrip("/").endswith(end):
            return sentence
    near = nearest(path, paths)
    meant = did_you_mean(near) if near else f"; to complete text, {INSTEAD}"
    return f"there is no {path[:100]} here{meant}"


def page(max_logprobs: int) -> str:
    """The page's HTML."""
    html = Path(__file__).with_name("page.html").read_text("utf-8")
    return html.replace("{{candidates}}", str(min(CANDIDATES, max_logprobs)))
