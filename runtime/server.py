"""A local HTTP server that speaks OpenAI's API, for one model on one engine.

Requests take turns on the engine's only thread. Nothing is trusted: bodies are bounded, unknown
fields refused, and a web page cannot reach the server through a name that it rebinds to loopback.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING, Any

from edgekd.errors import EdgekdError, EngineError, MissingExtraError, RecipeError
from edgekd.runtime.chat import chat_prompt
from edgekd.runtime.generate import Piece, generate
from edgekd.runtime.loading import LoadedModel
from edgekd.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

    from edgekd.runtime.openai_api import ApiError, ChatRequest, CompletionRequest, ReplyShape

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
MAX_WAITING = 32
MAX_BODY_BYTES = 1024 * 1024

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

_log = logging.getLogger("uvicorn.error")


def serve(loaded: LoadedModel, alias: str, host: str, port: int, api_key: str | None) -> None:
    """Return when the server is stopped (Ctrl-C); until then ``loaded`` answers as ``alias``.

    Raises:
        RecipeError: other machines could reach ``host``, and there is no ``api_key``.
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
    hosts = LOOPBACK_HOSTS | {_host_name(host)} if is_local else None
    app = create_app(loaded, alias, api_key, allowed_hosts=hosts)
    uvicorn.run(
        app, host=host, port=port, timeout_graceful_shutdown=5, server_header=False, ws="none"
    )


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
    turns = _Turns(loaded)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        turns.close()

    app = FastAPI(title="edgekd", openapi_url=None, lifespan=lifespan)
    _add_error_handlers(app)
    _add_routes(app, alias, turns)
    app.add_middleware(_Guard, api_key, allowed_hosts)
    return app


class _Job:
    """One request's way through the engine; cancelling it takes effect within one token."""

    def __init__(self, loaded: LoadedModel, prompt_ids: list[int], params: SamplingParams) -> None:
        self.n_prompt = len(prompt_ids)
        self.future: Future[None] | None = None
        self._work = (loaded, prompt_ids, params)
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._is_cancelled = threading.Event()
        self._watcher: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Generate, on the engine's thread."""
        try:
            with closing(generate(*self._work)) as pieces:
                for piece in pieces:
                    if self._is_cancelled.is_set():
                        return
                    self._put(piece)
        except Exception as error:  # whatever it is, the request must hear of it
            self._put(error)

    async def next(self) -> Piece:
        """Return the next piece, or raise what the engine raised."""
        found = await self._arrived.get()
        if isinstance(found, Exception):
            raise found
        return found

    def watch(self, request: "Request") -> None:
        """Cancel the job when the client goes."""

        async def wait_for_disconnect() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.cancel()

        self._watcher = asyncio.create_task(wait_for_disconnect())

    def cancel(self) -> None:
        """Give the turn to the next one; harmless after the end."""
        self._is_cancelled.set()
        if self.future:
            self.future.cancel()
        self._arrived.put_nowait(EngineError("the request was cancelled"))

    def close(self) -> None:
        """End the job, finished or not."""
        if self._watcher:
            self._watcher.cancel()
        self.cancel()

    def _put(self, found: Piece | Exception) -> None:
        with suppress(RuntimeError):  # the server was stopped, and its event loop with it
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, found)


class _Turns:
    """The engine's only thread: its queue is the lock, and keeps the order of arrival."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._thread = ThreadPoolExecutor(1, "edgekd-engine")
        self._jobs: list[_Job] = []

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> _Job:
        """Return a new job at the end of the queue.

        Raises:
            ApiError: the queue is full.
        """
        self._jobs = [job for job in self._jobs if job.future and not job.future.done()]
        if len(self._jobs) > MAX_WAITING:  # one of them has its turn
            raise _queue_full()
        job = _Job(self.loaded, prompt_ids, params)
        job.future = self._thread.submit(job.run)
        self._jobs.append(job)
        return job

    def close(self) -> None:
        """Cancel every job and end the thread."""
        for job in self._jobs:
            job.close()
        self._thread.shutdown()


class _Guard:
    """Refuses a request before the app sees it: foreign host, no key, or too long a body."""

    def __init__(self, app: _App, api_key: str | None, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._hosts = hosts

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        body = None if refusal else await _read_body(headers, receive)
        if body is None:
            response = _error_response(refusal or _body_too_long())
            return await response(scope, receive, send)
        return await self._app(scope, _replay(body, receive), send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> "ApiError | None":
        from edgekd.runtime.openai_api import ApiError

        host = _host_name(headers.get(b"host", b"").decode("latin-1"))
        if self._hosts is not None and host not in self._hosts:
            return ApiError(403, f"host {host!r} is not served here", code="host_not_allowed")
        if self._key is None or path == "/health":
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key):
            return None
        message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
        challenge = {"WWW-Authenticate": "Bearer"}
        return ApiError(401, message, code="invalid_api_key", headers=challenge)


async def _read_body(headers: dict[bytes, bytes], receive: _Receive) -> bytes | None:
    """Return the whole body; None if it is longer than allowed, whatever it was said to be."""
    said = headers.get(b"content-length", b"0")
    if not said.isdigit() or int(said) > MAX_BODY_BYTES:
        return None
    body = bytearray()
    has_more = True
    while has_more and len(body) <= MAX_BODY_BYTES:
        message = await receive()
        body += message.get("body", b"")
        has_more = message.get("more_body", False)
    return None if len(body) > MAX_BODY_BYTES else bytes(body)


def _replay(body: bytes, receive: _Receive) -> _Receive:
    """Return a ``receive`` that gives ``body`` first."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return messages.pop() if messages else await receive()

    return replay


def _add_routes(app: "FastAPI", alias: str, turns: _Turns) -> None:
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
        return _error_response(as_api_error(error))

    for kind in (ApiError, EdgekdError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(BaseHTTPException, handle)


async def _answer(
    turns: _Turns,
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


async def _whole(job: _Job, piece: Piece, shape: "ReplyShape") -> dict[str, Any]:
    from edgekd.runtime.openai_api import usage

    text, n_tokens = piece.text, 1
    while piece.finish_reason is None:
        piece = await job.next()
        text += piece.text
        n_tokens += 1
    job.close()
    return shape.whole(text, piece.finish_reason, usage(job.n_prompt, n_tokens))


async def _events(
    job: _Job, piece: Piece, shape: "ReplyShape", with_usage: bool
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


def _error_response(error: "ApiError") -> "Response":
    from fastapi.responses import JSONResponse

    return JSONResponse(error.body, error.status, error.headers)


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


def _queue_full() -> "ApiError":
    from edgekd.runtime.openai_api import ApiError

    return ApiError(
        429,
        f"{MAX_WAITING} requests are waiting already; try again later",
        code="queue_full",
        type="rate_limit_error",
        headers={"Retry-After": "5"},
    )


def _body_too_long() -> "ApiError":
    from edgekd.runtime.openai_api import ApiError

    message = f"the body is longer than {MAX_BODY_BYTES} bytes; shorten it"
    return ApiError(413, message, code="body_too_long")


def _host_name(host: str) -> str:
    """Return ``host`` without its port, IPv6 in brackets, as a Host header names it."""
    if host.count(":") > 1 and not host.startswith("["):
        return f"[{host.lower()}]"
    name, bracket, _ = host.partition("]")
    return (name + bracket if bracket else host.partition(":")[0]).lower()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
