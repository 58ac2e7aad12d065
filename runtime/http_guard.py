"""What a request must pass before the app sees it: the host it asks for, its key, its body."""

import asyncio
import hmac
from collections.abc import MutableMapping
from typing import Any

from edgekd.runtime.api_errors import ApiError, error_response
from edgekd.runtime.asgi import App, Receive, Scope, Send, headers_of
from edgekd.runtime.host_names import host_name
from edgekd.runtime.page_routes import PAGE_PATHS

MAX_BODY_BYTES = 1024 * 1024
MAX_SKIPPED_BYTES = 16 * 1024 * 1024
"""So much is read and dropped: who is cut off while sending may never see the answer."""
BODY_S = 30.0
"""Time for a body to arrive."""
OPEN_PATHS = PAGE_PATHS | {"/health", "/v1/health"}
"""What needs no key."""


class Guard:
    """Refuses a request before the app sees it: foreign host, no key, or too long a body."""

    body_s = BODY_S

    def __init__(self, app: App, api_key: str | None, hosts: frozenset[str] | None) -> None:
        """Stand before ``app``; ``hosts`` are the names it may be called by, None allows any."""
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused, pass on what is not (ASGI)."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = headers_of(scope)
        try:
            self._check(scope["path"], headers)
            async with asyncio.timeout(self.body_s):
                body = await _read_body(headers, receive)
        except TimeoutError:
            message = f"the body took over {self.body_s:.0f} s"
            # Else uvicorn reads on for as long as the client sends.
            close = {"Connection": "close"}
            late = ApiError(408, message, code="body_too_slow", headers=close)
            return await error_response(late)(scope, receive, send)
        except ApiError as error:
            return await error_response(error)(scope, receive, send)
        return await self._app(scope, _replay(body, receive), send)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        host = host_name(headers.get(b"host", b"").decode("latin-1"))
        if self._hosts is not None and host not in self._hosts:
            message = f"host {host[:200]!r} is not served here; --allowed-host lets it in"
            raise ApiError(403, message, code="host_not_allowed")
        if self._key is None or path in OPEN_PATHS:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            key = headers.get(b"x-api-key", b"")
        if hmac.compare_digest(key.strip(), self._key):
            return
        message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
        challenge = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, message, code="invalid_api_key", headers=challenge)


async def _read_body(headers: dict[bytes, bytes], receive: Receive) -> bytes:
    """Return the whole body.

    Raises:
        ApiError: it is longer than allowed, whatever it was said to be.
    """
    said = headers.get(b"content-length", b"0")
    if not said.isdigit() or len(said) > 18 or int(said) > MAX_SKIPPED_BYTES:
        raise _body_too_long()
    body, n_bytes = bytearray(), 0
    has_more = True
    while has_more and n_bytes <= MAX_SKIPPED_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        n_bytes += len(message.get("body", b""))
        if n_bytes <= MAX_BODY_BYTES:
            body += message.get("body", b"")
        has_more = message.get("more_body", False)
    if n_bytes > MAX_BODY_BYTES:
        raise _body_too_long()
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives ``body`` first."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return messages.pop() if messages else await receive()

    return replay


def _body_too_long() -> ApiError:
    message = f"the body is longer than {MAX_BODY_BYTES} bytes; shorten it"
    return ApiError(413, message, code="body_too_long")
