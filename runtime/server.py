"""A local HTTP server that speaks OpenAI's API and llama-server's, for one model.

The engine runs in a process of its own; this one only checks, queues and passes on. Nothing is
trusted: bodies are bounded, unknown fields refused, and a web page cannot reach the server
through a name that it rebinds to loopback.
"""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.errors import EdgekdError, MissingExtraError, RecipeError
from edgekd.runtime.engine_process import EngineProcess
from edgekd.runtime.engine_worker import WorkerSettings
from edgekd.runtime.host_names import allowed_names, bracketed, check_names, is_loopback
from edgekd.runtime.origins import add_origins, check_origins
from edgekd.runtime.serve_metrics import Metrics
from edgekd.runtime.texts import Texts
from edgekd.runtime.tls import CIPHERS, check_tls

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

TIMEOUT_S = 600.0
DRAIN_S = 60
"""Time for running requests to end after SIGTERM; a second signal ends them at once."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where and as what a model is served."""

    alias: str
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    timeout_s: float = TIMEOUT_S
    """Longest life of a request, waiting included."""
    access_log: bool = True
    allowed_hosts: tuple[str, ...] = ()
    """Names that the server may be called by; without any, those of loopback or all."""
    cors_origins: tuple[str, ...] = ()
    """Whose pages may call the server besides its own."""
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before anything starts.

        Raises:
            RecipeError: other machines could reach the host, and there is no key; the key is
                empty; the time limit is no time; a host or an origin is none; or certificate and
                key are no pair.
        """
        if self.api_key is None and not is_loopback(self.host):
            raise RecipeError(
                f"host {self.host} can be reached from other machines, which needs an API key; "
                "set one, or serve on 127.0.0.1"
            )
        if self.api_key is not None and not self.api_key.strip():
            raise RecipeError("the API key is empty; give one, or leave it out to serve without")
        if not 0 < self.timeout_s < float("inf"):
            raise RecipeError(f"a time limit of {self.timeout_s} s is none; give more than 0")
        check_names(self.allowed_hosts)
        check_origins(self.cors_origins)
        check_tls(self.tls_cert, self.tls_key)

    @property
    def scheme(self) -> str:
        """How a URL of the server begins."""
        return "https" if self.tls_cert else "http"


def serve(
    settings: WorkerSettings,
    options: ServeOptions,
    announce: Callable[[str], None] = lambda url: None,
) -> None:
    """Return when the server is stopped (Ctrl-C, SIGTERM), running streams having ended.

    ``announce`` gets the URL when the model is ready; ``/health`` says 503 until then. Port 0
    takes a free one.

    Raises:
        RecipeError: the address cannot be listened on.
        EdgekdError: the model cannot be opened.
        MissingExtraError: fastapi or uvicorn is not installed.
    """
    try:
        import uvicorn

        from edgekd.runtime.http_timeouts import MAX_HEAD_BYTES, TimedH11
    except ImportError as error:
        raise MissingExtraError("uvicorn", "serve") from error
    _require_fastapi()
    with _listen(options.host, options.port) as listener:
        engine = EngineProcess(settings)
        try:
            config = uvicorn.Config(
                create_app(engine, options),
                http=TimedH11,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                timeout_graceful_shutdown=DRAIN_S,
                server_header=False,
                ws="none",
                lifespan="on",
                access_log=options.access_log,
                log_level="info" if options.access_log else "warning",
                ssl_certfile=options.tls_cert,
                ssl_keyfile=options.tls_key,
                ssl_ciphers=CIPHERS,
            )
            server = uvicorn.Server(config)
            port = listener.getsockname()[1]
            url = f"{options.scheme}://{bracketed(options.host)}:{port}"
            opened = _Opening(engine, server, lambda: announce(url))
            server.run([listener])
        finally:
            engine.close()
        opened.result()


def read_key(path: Path) -> str:
    """Return the API key in the file at ``path``.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the API key from {path}: {error}") from error


def create_app(engine: EngineProcess, options: ServeOptions) -> "FastAPI":
    """Return the app that serves ``engine``, which it closes when it ends.

    Raises:
        MissingExtraError: fastapi is not installed.
    """
    _require_fastapi()
    from fastapi import FastAPI

    from edgekd.runtime.embedding_routes import embedding_routes
    from edgekd.runtime.error_handlers import add_error_handlers
    from edgekd.runtime.http_guard import Guard
    from edgekd.runtime.native_routes import native_routes
    from edgekd.runtime.openai_routes import Served, openai_routes
    from edgekd.runtime.page_routes import page_routes
    from edgekd.runtime.status_routes import status_routes

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    texts = Texts(engine, Metrics(), options.timeout_s)
    served = Served(texts, options.alias)
    app = FastAPI(title="edgekd", docs_url=None, redoc_url=None, lifespan=lifespan)
    add_error_handlers(app)
    app.include_router(page_routes())
    app.include_router(status_routes(texts))
    app.include_router(openai_routes(served))
    app.include_router(embedding_routes(served))
    app.include_router(native_routes(served))
    hosts = allowed_names(options.host, options.allowed_hosts)
    app.add_middleware(Guard, options.api_key, hosts)
    add_origins(app, options.cors_origins)
    return app


class _Opening:
    """Waits for the model beside the server, which answers 503 meanwhile."""

    def __init__(
        self, engine: EngineProcess, server: "uvicorn.Server", announce: Callable[[], None]
    ) -> None:
        self._engine, self._server, self._announce = engine, server, announce
        self._error: EdgekdError | None = None
        self._thread = threading.Thread(target=self._wait, name="edgekd-opening", daemon=True)
        self._thread.start()

    def result(self) -> None:
        """Return if the model could be opened, or nobody waits for it any more."""
        self._thread.join()
        if self._error:
            raise self._error

    def _wait(self) -> None:
        try:
            self._engine.wait_ready()
        except EdgekdError as error:
            if self._engine.state != "stopped" or not self._server.should_exit:
                self._error = error
            self._server.should_exit = True
        else:
            self._announce()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host.strip("[]"), port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"cannot listen on {host}, port {port}: {reason}; choose another --port or --host"
        ) from error


def _require_fastapi() -> None:
    try:
        import fastapi  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("fastapi", "serve") from error
