"""Every failure of a route as OpenAI's JSON."""

import logging

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from edgekd.errors import EdgekdError
from edgekd.runtime.api_errors import (
    ApiError,
    as_api_error,
    describe_faults,
    error_response,
    status_error,
)

_log = logging.getLogger("uvicorn.error")


def add_error_handlers(app: FastAPI) -> None:
    """Let ``app`` answer errors in one form, whoever raised them."""

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            error = ApiError(400, describe_faults(error.errors()), code="invalid_request")
        elif isinstance(error, HTTPException):
            error = status_error(error.status_code, str(error.detail), error.headers)
        return error_response(as_api_error(error))

    kinds = (ApiError, EdgekdError, RequestValidationError, HTTPException, Exception)
    for kind in kinds:
        app.add_exception_handler(kind, handle)
