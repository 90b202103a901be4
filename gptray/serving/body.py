"""A request's body, read strictly as one JSON object.

Python's parser accepts NaN, numbers beyond the range of floats, duplicate keys and unpaired
surrogates; all are refused here. Every check is linear in the body's length.
"""

from __future__ import annotations

import json
import math
import re
from typing import NoReturn

from fastapi import Request

from gptray.data.rows import BOM, json_object
from gptray.serving.api_error import ApiError
from gptray.serving.arrival import Arrival

# No valid request is nested deeper.
MAX_DEPTH = 16
MAX_KEYS = 4096  # of one object

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_json(request: Request, arrival: Arrival) -> dict[str, object]:
    """The JSON object of a request's body.

    Raises ApiError, or ClientGone if the client disconnects before the body's end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type must be application/json, got {kind or 'none'}")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError(415, f"Content-Encoding {encoding} is not supported; send plain JSON")
    return strict_object(await arrival.body(request.scope, request.receive))


def strict_object(body: bytes) -> dict[str, object]:
    """Parse a body as a JSON object. Raises ApiError(400) if it is anything else."""
    try:
        # Decode first: Python's parser would accept surrogates in UTF-8, and UTF-16.
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


def _check_depth(value: dict[str, object] | list[object], depth: int) -> None:
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


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"an object has {len(pairs):,} keys, more than {MAX_KEYS:,}")
    for name, value in pairs:
        if name in found:
            raise ValueError(f"duplicate key {name[:60]!r}")
        found[name] = value
    return found
