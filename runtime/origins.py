"""Which web pages may call the server: its own, and those of origins that were named.

A browser names the page's origin with every request that changes something or that wants to read
an answer from elsewhere. Programs name none, and are not stopped here.
"""

import re
from typing import TYPE_CHECKING

from edgekd.errors import RecipeError
from edgekd.runtime.api_errors import ApiError, error_response
from edgekd.runtime.asgi import App, Receive, Scope, Send, headers_of

if TYPE_CHECKING:
    from fastapi import FastAPI

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@*,]+")
_PREFLIGHT_S = 600


def check_origins(origins: tuple[str, ...]) -> None:
    """Return only if every one of ``origins`` is one, as browsers write it.

    Raises:
        RecipeError: one is not.
    """
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise RecipeError(
                f"{origin!r} is no origin; name each as SCHEME://HOST or SCHEME://HOST:PORT in "
                "lower case with nothing behind it, such as https://example.org"
            )


def add_origins(app: "FastAPI", origins: tuple[str, ...]) -> None:
    """Let pages of ``origins`` call ``app``, and refuse those of all others but its own."""
    from fastapi.middleware.cors import CORSMiddleware

    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
            max_age=_PREFLIGHT_S,
        )
    app.add_middleware(OriginGuard, frozenset(origins))


class OriginGuard:
    """Refuses what a foreign page asks for."""

    def __init__(self, app: App, allowed: frozenset[str]) -> None:
        """Stand before ``app``; ``allowed`` are the origins besides its own."""
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused, pass on what is not (ASGI)."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = headers_of(scope)
        origin = headers.get(b"origin", b"").decode("latin-1")
        host = headers.get(b"host", b"").decode("latin-1")
        if origin and origin not in self._allowed and not _is_own(origin, host):
            message = (
                f"pages of {origin[:200]!r} may not call this server; "
                "start it with --cors-origin to let them"
            )
            error = ApiError(403, message, code="origin_not_allowed")
            return await error_response(error)(scope, receive, send)
        return await self._app(scope, receive, send)


def _is_own(origin: str, host: str) -> bool:
    """Return whether ``origin`` is the server that was called as ``host``.

    The scheme is not compared: behind a proxy that speaks TLS the server sees http.
    """
    scheme, _, name = origin.partition("://")
    return scheme in ("http", "https") and bool(name) and name.lower() == host.lower()
