"""The chat page and the API's documentation: a fixed table of files, read once.

Nothing of a URL ever becomes a path. The files need no key, for they hold nothing secret; what
they show comes from the API, which does. Scripts and styles may come from here only, so text of a
model could not run even where the page showed it wrongly.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, Request, Response

from edgekd.runtime.api_errors import ApiError

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, but asked for again: the ETag makes that cheap
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_OURS = {
    "/": "index.html",
    "/docs": "docs.html",
    "/page/api.js": "api.js",
    "/page/chat.css": "chat.css",
    "/page/chat.js": "chat.js",
    "/page/docs.css": "docs.css",
    "/page/docs.js": "docs.js",
    "/page/icon.svg": "icon.svg",
    "/page/markdown.js": "markdown.js",
    "/page/meters.js": "meters.js",
    "/page/settings.js": "settings.js",
    "/page/theme.css": "theme.css",
    "/page/theme.js": "theme.js",
}
_SWAGGER = {
    "/page/swagger-ui.css": "swagger-ui.css",
    "/page/swagger-ui-bundle.js": "swagger-ui-bundle.js",
}
PAGE_PATHS = frozenset({*_OURS, *_SWAGGER})
"""What needs no key."""


def page_routes() -> APIRouter:
    """Return the routes of the pages, which hold their files in memory."""
    router = APIRouter(include_in_schema=False)
    folder = Path(__file__).parent / "page"
    for path, name in _OURS.items():
        _add(router, path, folder / name)
    for path, name in _SWAGGER.items():
        _add(router, path, _swagger_folder() / name)
    return router


def _add(router: APIRouter, path: str, file: Path) -> None:
    """Serve ``file``, or say how to get it: Swagger UI's lie in a package of their own."""
    body = file.read_bytes() if file.is_file() else None
    tag = f'"{hashlib.sha256(body or b"").hexdigest()[:20]}"'
    headers = HEADERS | {"ETag": tag}

    async def serve_file(request: Request) -> Response:
        if body is None:
            message = f"{file.name} is not installed; run: pip install 'edgekd[serve]'"
            raise ApiError(404, message, code="not_found")
        if request.headers.get("if-none-match", "").removeprefix("W/") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=_TYPES[file.suffix], headers=headers)

    router.add_api_route(path, serve_file, methods=["GET", "HEAD"])


def _swagger_folder() -> Path:
    """Return where fastapi-offline keeps Swagger UI; it is not imported, only its files are."""
    spec = find_spec("fastapi_offline")
    found = spec.submodule_search_locations if spec else None
    return Path(found[0] if found else "fastapi_offline") / "static"
