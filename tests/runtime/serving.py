"""A real server in a thread, over a real engine in a process."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from edgekd.runtime.batch_engine import EngineOptions
from edgekd.runtime.engine_process import EngineProcess
from edgekd.runtime.engine_worker import WorkerSettings
from edgekd.runtime.http_timeouts import TimedH11
from edgekd.runtime.server import ServeOptions, create_app

Json = dict[str, Any]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# Flash attention rounds to half precision, differently for one row and for several.
ENGINE = EngineOptions(context_tokens=256, n_slots=3, kv_type="f32", flash_attention=False)
HELLO: Json = {
    "messages": [{"role": "user", "content": "The quick brown"}],
    "max_tokens": 24,
    "seed": 4,
}
CONTINUE: Json = {"prompt": "The quick brown", "max_tokens": 24, "seed": 4}
LONG: Json = {"prompt": "The", "max_tokens": 240, "ignore_eos": True, "stream": True}

TOOL_TEMPLATE = (
    "{% if tools %}{{ 'tools ' + (tools | tojson) + '\n' }}{% endif %}"
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}"
    "{{ '\n' }}{% endfor %}assistant: "
)


@dataclass(frozen=True)
class Serving:
    """A server that runs."""

    url: str
    engine: EngineProcess

    def post(self, route: str, asked: Any, **more: Any) -> httpx.Response:
        return httpx.post(self.url + route, json=asked, timeout=60, **more)

    def get(self, route: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + route, timeout=60, **more)


@contextmanager
def serving(
    path: Path,
    options: ServeOptions | None = None,
    *,
    max_waiting: int = 32,
    head_s: float = 10.0,
    wait: bool = True,
    **engine: Any,
) -> Iterator[Serving]:
    """Serve the model at ``path`` on a free port."""
    settings = WorkerSettings(
        model=str(path), options=replace(ENGINE, **engine), max_waiting=max_waiting
    )
    process = EngineProcess(settings)
    protocol = type("Timed", (TimedH11,), {"head_s": head_s})
    app = create_app(process, options or ServeOptions(alias="tiny"))
    config = uvicorn.Config(app, port=0, http=protocol, log_level="critical", ws="none")
    config.lifespan = "on"
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        if wait:
            process.wait_ready(60)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Serving(f"http://127.0.0.1:{port}", process)
    finally:
        server.should_exit = True
        thread.join()


def events(response: httpx.Response) -> list[Json]:
    """Return the events of a stream, checked for its form."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def refused(response: httpx.Response, status: int, code: str) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


def choice(response: httpx.Response) -> Json:
    found = response.json()
    assert response.status_code == 200, found
    return dict(found["choices"][0])
