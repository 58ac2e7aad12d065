"""Errors as clients of OpenAI's API get them: a status, and JSON that says what and why."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from edgekd.errors import (
    EdgekdError,
    EngineError,
    EngineUnavailableError,
    ModelError,
    QueueFullError,
)
from edgekd.runtime.messages import Failed

if TYPE_CHECKING:
    from fastapi import Response

RETRY_AFTER_S = 2
"""A small model is back in a second or two after its process died."""
_MAX_MESSAGE_CHARS = 2000

_FAILURES = {
    "cancelled": (503, "server_error"),
    "deadline": (504, "server_error"),
    "engine_died": (503, "server_error"),
    "engine_error": (500, "server_error"),
    "invalid_request": (400, "invalid_request_error"),
    "queue_full": (429, "rate_limit_error"),
}
_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_long",
}


class ApiError(Exception):
    """A request that is refused, or fails, with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Say what happened; ``code`` is for programs, ``message`` for people."""
        super().__init__(message)
        self.status = status
        retry = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
        self.headers = retry | (headers or {})
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": type, "param": param, "code": code}
        }


def as_api_error(error: Exception) -> ApiError:
    """Return what the client is told of ``error``."""
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, QueueFullError):
        return ApiError(429, message, code="queue_full", type="rate_limit_error")
    if isinstance(error, EngineUnavailableError):
        return ApiError(503, message, code="engine_unavailable", type="server_error")
    if isinstance(error, EngineError):
        return ApiError(500, message, code="engine_error", type="server_error")
    if isinstance(error, ModelError):  # well-formed, but nothing that this model can do
        return ApiError(422, message, code="model_cannot")
    if isinstance(error, EdgekdError):
        return ApiError(400, message, code="invalid_value")
    message = "internal error; the server's log has the details"
    return ApiError(500, message, code="internal_error", type="server_error")


def failure(failed: Failed) -> ApiError:
    """Return what the client is told of a request that the scheduler gave up."""
    status, kind = _FAILURES[failed.code]
    return ApiError(status, failed.message, code=failed.code, type=kind)


def status_error(status: int, detail: str, headers: Mapping[str, str] | None) -> ApiError:
    """Return the error of a route that is not there, and the like."""
    code = _CODES.get(status, "invalid_request")
    return ApiError(status, detail, code=code, headers=dict(headers or {}))


def describe_faults(faults: Iterable[Any]) -> str:
    """Return pydantic's ``faults`` as one line that names each field."""
    lines = []
    for fault in faults:
        where = ".".join(str(part) for part in fault["loc"] if part != "body")
        message = fault["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {message}" if where else message)
    return "; ".join(lines)[:_MAX_MESSAGE_CHARS]


def error_response(error: ApiError) -> "Response":
    """Return ``error`` as the client gets it."""
    from fastapi.responses import JSONResponse

    return JSONResponse(error.body, error.status, error.headers)
