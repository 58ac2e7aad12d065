"""What the OpenAPI document says of answers: every status, with its headers and its shape.

Imports pydantic, so only the server imports this.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgekd.runtime.api_answers import ErrorAnswer

if TYPE_CHECKING:
    from fastapi import APIRouter

Json = dict[str, Any]
Responses = dict[int | str, Json]

_RETRY = {"Retry-After": {"schema": {"type": "integer"}, "required": True}}
_CHALLENGE = {"WWW-Authenticate": {"schema": {"type": "string"}, "required": True}}
_ALWAYS: dict[int, tuple[str, Json]] = {
    400: ("The request is malformed; the message names the field.", {}),
    401: ("The API key is missing or wrong.", _CHALLENGE),
    403: ("The server is not called by this name.", {}),
    408: ("The body took too long to arrive.", {}),
    413: ("The body is too long.", {}),
    503: ("The engine is loading, restarting or full; try again.", _RETRY),
}
_WITH_MODEL: dict[int, tuple[str, Json]] = {
    404: ("There is no such model.", {}),
    422: ("The model cannot do this.", {}),
    429: ("Too many requests wait already; try again.", _RETRY),
    500: ("The engine failed on this request.", {}),
    504: ("The request took longer than the server allows.", {}),
}
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


def documented(answer: Any = None, *, streams: bool = False, asks_model: bool = False) -> Responses:
    """Return the answers of a route: ``answer`` at 200, and every error it may have.

    ``streams`` says that the answer may also come as server-sent events, ``asks_model`` that the
    request names the model or goes to it.
    """
    success: Json = {} if answer is None else {"model": answer}
    if streams:
        success |= {"content": _STREAM}
    errors = _ALWAYS | (_WITH_MODEL if asks_model else {})
    found: Responses = {200: success | {"description": "Success"}}
    for status, (description, headers) in sorted(errors.items()):
        found[status] = {"model": ErrorAnswer, "description": description, "headers": headers}
    return found


def with_and_without_v1(
    router: "APIRouter", path: str, route: Callable[..., Any], method: str, responses: Responses
) -> None:
    """Add ``route`` under ``path`` and, not in the document, under the same behind /v1."""
    router.add_api_route(path, route, methods=[method], responses=responses)
    router.add_api_route("/v1" + path, route, methods=[method], include_in_schema=False)
