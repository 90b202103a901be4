"""A request's body: read within limits of time and size, then strictly as one JSON object.

Python's reader takes NaN, numbers beyond the range of floats, duplicate keys and half a surrogate
pair; here all of them are refused. Every check is linear in the body's length.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from typing import Any, NoReturn

from fastapi import Request

from gptray.config import ServeConfig
from gptray.data.rows import BOM, json_object
from gptray.serving.errors import ApiError, ClientGone

# No request has reason to be nested deeper.
MAX_DEPTH = 16
MAX_KEYS = 4096  # of one object
# This many bodies of the largest size may be arriving at a time; small ones always may.
LARGEST_AT_ONCE, SMALL = 64, 16 << 10
# An answer that comes before the body's end is the connection's last.
CLOSE = {"Connection": "close"}

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class BodyReader:
    """Reads the bodies of one server, within limits for each and for all together."""

    def __init__(self, limits: ServeConfig) -> None:
        self._max_bytes, self._timeout_s = limits.max_body_bytes, limits.body_timeout_s
        self._held = 0  # bytes of bodies that are still arriving

    async def read_json(self, request: Request) -> dict[str, Any]:
        """The JSON object of a body.

        Raises ApiError, or ClientGone if the client goes away before the body's end.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"Content-Type must be application/json, got {kind or 'none'}")
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise ApiError(415, f"Content-Encoding {encoding} is not supported; send plain JSON")
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(request)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not arrive within {self._timeout_s:g} s (serve.body_timeout_s)",
                headers=CLOSE,
            ) from None
        return strict_object(body)

    async def _read(self, request: Request) -> bytes:
        said = request.headers.get("content-length", "")
        if said.isdecimal() and int(said[:20]) > self._max_bytes:
            raise self._too_long()
        body = bytearray()
        try:
            async for part in _parts(request):
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


async def _parts(request: Request) -> AsyncIterator[bytes]:
    """A body as it arrives. Raises ClientGone."""
    has_more = True
    while has_more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        has_more = message.get("more_body", False)


def strict_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is. Raises ApiError(400) saying what is wrong with it."""
    try:
        # Decoded here: Python's reader would take surrogates in UTF-8, and UTF-16.
        found = json_object(
            body.removeprefix(BOM).decode(),
            parse_constant=_no_number,
            parse_float=_finite,
            object_pairs_hook=_distinct,
        )
        _check_depth(found, MAX_DEPTH)
        if _SURROGATE_ESCAPE.search(body):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason}") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the body contains half a surrogate pair") from None
    except ValueError as error:
        raise ApiError(400, f"the body: {error}") from None
    return found


def _check_depth(value: Any, depth: int) -> None:
    if depth == 0:
        raise ValueError("nested too deeply")
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, (dict, list)):
            _check_depth(inner, depth - 1)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"an object has {len(pairs):,} keys, more than {MAX_KEYS:,}")
    for name, value in pairs:
        if name in found:
            raise ValueError(f"duplicate key {name[:60]!r}")
        found[name] = value
    return found
