"""A local HTTP server that speaks OpenAI's API, for one model on one engine.

Requests take turns on the engine's only thread. Nothing is trusted: bodies are bounded, unknown
fields refused, and a web page cannot reach the server through a name that it rebinds to loopback.
"""

import asyncio
import ipaddress
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EdgekdError, MissingExtraError, RecipeError
from edgekd.runtime.chat import chat_prompt
from edgekd.runtime.generate import Piece
from edgekd.runtime.http_guard import Guard, bracketed, error_response, host_name
from edgekd.runtime.loading import LoadedModel
from edgekd.runtime.turns import Job, Turns

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

    from edgekd.runtime.openai_api import ChatRequest, CompletionRequest, ReplyShape

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})

_log = logging.getLogger("uvicorn.error")


def serve(
    loaded: LoadedModel,
    alias: str,
    host: str,
    port: int,
    api_key: str | None,
    announce: Callable[[str], None] = lambda url: None,
    *,
    access_log: bool = True,
) -> None:
    """Return when the server is stopped (Ctrl-C); until then ``loaded`` answers as ``alias``.

    ``announce`` gets the URL once the port is taken; port 0 takes a free one.

    Raises:
        RecipeError: other machines could reach ``host``, and there is no ``api_key``; or the
            address cannot be listened on.
        MissingExtraError: fastapi or uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("fastapi", "serve") from error
    is_local = _is_loopback(host)
    if not is_local and api_key is None:
        raise RecipeError(
            f"host {host} can be reached from other machines, which needs an API key; "
            "set one, or serve on 127.0.0.1"
        )
    hosts = LOOPBACK_HOSTS | {host_name(host)} if is_local else None
    app = create_app(loaded, alias, api_key, allowed_hosts=hosts)
    with _listen(host, port) as listener:
        announce(f"http://{bracketed(host)}:{listener.getsockname()[1]}")
        config = uvicorn.Config(
            app,
            timeout_graceful_shutdown=5,
            server_header=False,
            ws="none",
            access_log=access_log,
            log_level="info" if access_log else "warning",
        )
        uvicorn.Server(config).run([listener])


def read_key(path: Path) -> str:
    """Return the API key in the file at ``path``.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the API key from {path}: {error}") from error


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host.strip("[]"), port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"cannot listen on {host}, port {port}: {reason}; choose another --port or --host"
        ) from error


def create_app(
    loaded: LoadedModel,
    alias: str,
    api_key: str | None,
    *,
    allowed_hosts: frozenset[str] | None = LOOPBACK_HOSTS,
) -> "FastAPI":
    """Return the app that serves ``loaded`` under the name ``alias``.

    ``allowed_hosts`` are the names under which clients may call it; None allows any.

    Raises:
        RecipeError: the API key is empty.
        MissingExtraError: fastapi is not installed.
    """
    try:
        from fastapi import FastAPI
    except ImportError as error:
        raise MissingExtraError("fastapi", "serve") from error
    if api_key is not None and not api_key.strip():
        raise RecipeError("the API key is empty; give one, or leave it out to serve without")
    turns = Turns(loaded)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        turns.close()

    app = FastAPI(title="edgekd", openapi_url=None, lifespan=lifespan)
    _add_error_handlers(app)
    _add_routes(app, alias, turns)
    app.add_middleware(Guard, api_key, allowed_hosts)
    return app


def _add_routes(app: "FastAPI", alias: str, turns: Turns) -> None:
    from fastapi import Request, Response

    from edgekd.runtime.openai_api import ChatRequest, CompletionRequest, Json, ReplyShape

    started = int(time.time())

    @app.get("/health")
    async def health() -> Json:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> Json:
        model = {"id": alias, "object": "model", "created": started, "owned_by": "edgekd"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        _check_model(asked.model, alias)
        messages = [message.for_template() for message in asked.messages]
        prompt_ids = await asyncio.to_thread(chat_prompt, turns.loaded, messages)
        return await _answer(turns, request, asked, prompt_ids, ReplyShape(alias, is_chat=True))

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        _check_model(asked.model, alias)
        prompt_ids = await asyncio.to_thread(turns.loaded.tokenizer.encode, asked.prompt)
        return await _answer(turns, request, asked, prompt_ids, ReplyShape(alias, is_chat=False))


def _add_error_handlers(app: "FastAPI") -> None:
    from fastapi import Request, Response
    from fastapi.exceptions import HTTPException, RequestValidationError
    from starlette.exceptions import HTTPException as BaseHTTPException

    from edgekd.runtime.openai_api import ApiError, as_api_error, describe_faults

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            error = ApiError(400, describe_faults(error.errors()), code="invalid_request")
        elif isinstance(error, BaseHTTPException):
            error = ApiError(error.status_code, error.detail, code="invalid_request")
        return error_response(as_api_error(error))

    for kind in (ApiError, EdgekdError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(BaseHTTPException, handle)


async def _answer(
    turns: Turns,
    request: "Request",
    asked: "ChatRequest | CompletionRequest",
    prompt_ids: list[int],
    shape: "ReplyShape",
) -> "Response":
    """Return the reply to ``prompt_ids``, whole or as a stream."""
    from fastapi.responses import JSONResponse, StreamingResponse

    context_tokens = turns.loaded.engine.context_tokens
    _check_length(len(prompt_ids), context_tokens)
    job = turns.submit(prompt_ids, asked.sampling(context_tokens))
    job.watch(request)
    try:
        first = await job.next()  # what fails before the first token has a status of its own
        if not asked.stream:
            return JSONResponse(await _whole(job, first, shape))
    except BaseException:
        job.close()
        raise
    events = _events(job, first, shape, asked.stream_options.include_usage)
    return StreamingResponse(events, media_type="text/event-stream")


async def _whole(job: Job, piece: Piece, shape: "ReplyShape") -> dict[str, Any]:
    from edgekd.runtime.openai_api import usage

    text, n_tokens = piece.text, 1
    while piece.finish_reason is None:
        piece = await job.next()
        text += piece.text
        n_tokens += 1
    job.close()
    return shape.whole(text, piece.finish_reason, usage(job.n_prompt, n_tokens))


async def _events(
    job: Job, piece: Piece, shape: "ReplyShape", with_usage: bool
) -> AsyncIterator[str]:
    """Yield the reply as server-sent events; an engine that fails midway is the last of them."""
    from edgekd.runtime.openai_api import as_api_error, usage

    blank = {"usage": None} if with_usage else {}
    n_tokens = 1
    try:
        for part in shape.opening() + shape.part(piece.text, piece.finish_reason):
            yield _event(part | blank)
        while piece.finish_reason is None:
            piece = await job.next()
            n_tokens += 1
            for part in shape.part(piece.text, piece.finish_reason):
                yield _event(part | blank)
        if with_usage:
            yield _event(shape.counts(usage(job.n_prompt, n_tokens)))
        yield "data: [DONE]\n\n"
    except Exception as error:
        _log.warning("a stream ended early: %s", error)
        yield _event(as_api_error(error).body)
    finally:
        job.close()


def _event(part: dict[str, Any]) -> str:
    return f"data: {json.dumps(part, ensure_ascii=False)}\n\n"


def _check_model(model: str | None, alias: str) -> None:
    from edgekd.runtime.openai_api import ApiError

    if model not in (None, alias):
        message = f"there is no model {model!r} here, only {alias!r}; leave the name out or use it"
        raise ApiError(404, message, code="model_not_found")


def _check_length(n_tokens: int, context_tokens: int) -> None:
    from edgekd.runtime.openai_api import ApiError

    if n_tokens > context_tokens:
        message = (
            f"the prompt has {n_tokens} tokens, the context holds {context_tokens}; shorten it"
        )
        raise ApiError(400, message, code="context_length_exceeded")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
