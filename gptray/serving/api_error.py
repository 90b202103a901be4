"""Errors of a request, in the form that OpenAI's clients expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastapi.responses import JSONResponse

# OpenAI's error types by status.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# The most models that an error message lists.
MAX_LISTED = 10


class ApiError(Exception):
    """An error response. param: the offending key of the request, if any."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code = param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        client = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, client),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def unknown_model(name: str, served: Sequence[str]) -> ApiError:
    """The error for a request for a model that is not served."""
    known = ", ".join(served[:MAX_LISTED])
    if len(served) > MAX_LISTED:
        known += f" and {len(served) - MAX_LISTED:,} more (GET /v1/models)"
    message = f"The model `{name[:100]}` does not exist. Served here: {known}."
    return ApiError(404, message, param="model", code="model_not_found")


class ClientGone(Exception):
    """The client has disconnected."""
