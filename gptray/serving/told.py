"""Turns exceptions into answers."""

from __future__ import annotations

from gptray.config import UserError
from gptray.serving.api_error import ApiError
from gptray.serving.engine_thread import Overloaded
from gptray.serving.streams import EngineStopped


def told(error: Exception) -> ApiError:
    """The answer that an exception becomes."""
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
