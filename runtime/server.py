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
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

from edgekd.errors import MissingExtraError, RecipeError
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
        self._work = (loaded, prompt_ids, params)
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._is_cancelled = threading.Event()
        self.future: Future[None] | None = None

    def run(self) -> None:
        """Generate, on the engine's thread."""
        try:
            with closing(generate(*self._work)) as pieces:
                while not self._is_cancelled.is_set():
                    self._put(next(pieces))
        except StopIteration:
            return
        except Exception as error:  # whatever it is, the request must hear of it
            self._put(error)

    async def next(self) -> Piece:
        """Return the next piece, or raise what the engine raised."""
        found = await self._arrived.get()
        if isinstance(found, Exception):
            raise found
        return found

    def cancel(self) -> None:
        """Give the turn to the next one; harmless after the end."""
        from edgekd.runtime.openai_api import ApiError

        self._is_cancelled.set()
        if self.future:
            self.future.cancel()
        gone = ApiError(499, "the request was cancelled", code="cancelled")
        self._arrived.put_nowait(gone)

    async def cancel_on_disconnect(self, request: "Request") -> None:
        """Return when the client is gone."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.cancel()

    def _put(self, found: Piece | Exception) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, found)


class _Turns:
    """The engine's only thread: its queue is the lock, and keeps the order of arrival."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._thread = ThreadPoolExecutor(1, "edgekd-engine")
        self._jobs: list[_Job] = []

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> _Job:
        """Return the job at the end of the queue, unless that is full."""
        from edgekd.runtime.openai_api import ApiError

        self._jobs = [job for job in self._jobs if job.future and not job.future.done()]
        if len(self._jobs) > MAX_WAITING:  # one of them has its turn
            raise ApiError(
                429,
                f"{MAX_WAITING} requests are waiting already; try again later",
                code="queue_full",
                type="rate_limit_error",
                headers={"Retry-After": "5"},
            )
        job = _Job(self.loaded, prompt_ids, params)
        job.future = self._thread.submit(job.run)
        self._jobs.append(job)
        return job

    def close(self) -> None:
        for job in self._jobs:
            job.cancel()
        self._thread.shutdown()


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
    _check_prompt(prompt_ids, context_tokens)
    job = turns.submit(prompt_ids, asked.sampling(context_tokens))
    watcher = asyncio.create_task(job.cancel_on_disconnect(request))
    job.future and job.future.add_done_callback(lambda _: None)
    try:
        first = await job.next()  # what fails before the first token has a status of its own
        if asked.stream:
            events = _events(job, first, asked.stream_options.include_usage, shape, len(prompt_ids))
            return StreamingResponse(events, media_type="text/event-stream")
        return JSONResponse(await _whole(job, first, shape, len(prompt_ids)))
    except BaseException:
        job.cancel()
        raise
    finally:
        watcher.cancel()
