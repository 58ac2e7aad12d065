"""What goes wrong around a server: engines that die, clients that leave or dawdle, full queues."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from edgekd.runtime.http_guard import Guard
from edgekd.runtime.http_timeouts import TimedH11
from edgekd.runtime.server import ServeOptions
from tests.runtime.serving import CONTINUE, LONG, TEXT, Json, Serving, refused, serving


@pytest.fixture(scope="module", params=["float_gguf", "float_onnx"])
def server(request: pytest.FixtureRequest) -> Iterator[Serving]:
    with serving(request.getfixturevalue(request.param)) as found:
        yield found


# Ten texts, three of them side by side, so that there is time to interrupt them.
ENDLESS: Json = LONG | {"n": 10}


def wait_until(is_true: Callable[[], bool], limit_s: float = 10.0) -> float:
    """Return the seconds it took."""
    begun_s = time.monotonic()
    while not is_true():
        assert time.monotonic() - begun_s < limit_s
        time.sleep(0.005)
    return time.monotonic() - begun_s


def lines_of(server: Serving, asked: Json) -> list[str]:
    with httpx.stream("POST", server.url + TEXT, json=asked, timeout=60) as response:
        assert response.status_code == 200
        return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def texts_of(lines: list[str]) -> list[str]:
    """Return each choice's text."""
    found = [""] * ENDLESS["n"]
    for part in (json.loads(line) for line in lines if line != "[DONE]"):
        for each in part.get("choices", ()):
            found[each["index"]] += each["text"]
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_slot(server: Serving, stream: bool) -> None:
    asked = ENDLESS | {"stream": stream, "n": 16}
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream("POST", server.url + TEXT, json=asked, timeout=0.1) as response,
    ):
        line = next(response.iter_lines())
        assert server.engine.n_requests > 1, line
        raise httpx.ReadTimeout("seen enough")
    assert wait_until(lambda: server.engine.n_requests == 0) < 2


def test_a_killed_engine_ends_its_streams_with_an_error_and_comes_back(server: Serving) -> None:
    prompts = ["The", "def add", "A distribution"]
    asked = [ENDLESS | {"prompt": p, "temperature": 0} for p in prompts]
    expected = [texts_of(lines_of(server, each)) for each in asked]
    found: dict[int, list[str]] = {}

    def client(index: int) -> None:
        response = server.post(TEXT, asked[index])
        assert response.status_code in (200, 503)  # 503 where nothing had begun yet
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        found[index] = lines

    for number in range(3):
        restarts = server.engine.restarts
        clients = [threading.Thread(target=client, args=(index,)) for index in range(3)]
        for each in clients:
            each.start()
        wait_until(lambda: server.engine.n_requests == 30)
        time.sleep(0.05 * number)
        assert server.engine.pid
        os.kill(server.engine.pid, signal.SIGKILL)
        wait_until(lambda: server.engine.restarts > restarts)  # noqa: B023
        if server.engine.state != "ready":
            response = server.post(TEXT, CONTINUE)
            if response.status_code != 200:
                refused(response, 503, "engine_unavailable")
                assert int(response.headers["Retry-After"]) > 0
                assert server.get("/health").status_code in (200, 503)
        for each in clients:
            each.join()
        assert wait_until(lambda: server.get("/health").status_code == 200, 30) < 15
        for index, lines in found.items():
            error = json.loads(lines[-1])["error"]
            assert error["code"] == "engine_died" and "SIGKILL" in error["message"]
            for whole, text in zip(expected[index], texts_of(lines), strict=True):
                assert whole.startswith(text)
    assert server.post(TEXT, CONTINUE).status_code == 200
    assert "edgekd_engine_restarts_total 3" in server.get("/metrics").text


def test_a_full_queue_sends_clients_away_and_serves_the_rest(float_gguf: Path) -> None:
    with serving(float_gguf, max_waiting=2, n_slots=2) as server:
        answers: list[httpx.Response] = []

        def client() -> None:
            answers.append(server.post(TEXT, LONG | {"stream": False}))

        clients = [threading.Thread(target=client) for _ in range(12)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()
        served = [each for each in answers if each.status_code == 200]
        busy = [each for each in answers if each.status_code == 429]
        assert len(served) >= 4 and busy and len(served) + len(busy) == 12
        assert all(each.json()["usage"]["completion_tokens"] == 240 for each in served)
        refused(busy[0], 429, "queue_full")
        assert int(busy[0].headers["Retry-After"]) > 0


def test_a_request_that_takes_too_long_is_given_up(float_gguf: Path) -> None:
    options = ServeOptions(alias="tiny", timeout_s=0.05)
    with serving(float_gguf, options) as server:
        refused(server.post(TEXT, ENDLESS | {"stream": False}), 504, "deadline")
        assert json.loads(lines_of(server, ENDLESS)[-1])["error"]["code"] == "deadline"
        assert server.post(TEXT, CONTINUE | {"max_tokens": 1}).status_code == 200


def test_slow_heads_are_closed_and_delay_nobody(float_gguf: Path) -> None:
    with serving(float_gguf, head_s=0.5) as server:
        address = urlsplit(server.url)
        assert address.hostname and address.port
        slow = [socket.create_connection((address.hostname, address.port)) for _ in range(50)]
        for number, each in enumerate(slow):
            each.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" * (number % 2))
        begun_s = time.monotonic()
        assert server.post(TEXT, CONTINUE).status_code == 200
        assert time.monotonic() - begun_s < 2
        for each in slow:
            with closing(each):
                each.settimeout(5)
                assert each.recv(100) == b""
        # A head that is complete in time has all the time it needs for its answer.
        with httpx.Client() as client:
            for _ in range(2):
                assert client.get(server.url + "/health").status_code == 200
                time.sleep(0.6)


def test_slow_bodies_get_a_408_and_delay_nobody(
    float_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guard, "body_s", 2.5)
    with serving(float_gguf) as server:
        address = urlsplit(server.url)
        assert address.hostname and address.port
        slow = [socket.create_connection((address.hostname, address.port)) for _ in range(50)]
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"
        for each in slow:
            each.sendall(head)
        for _ in range(2):  # a byte a second
            for each in slow:
                each.sendall(b" ")
            begun_s = time.monotonic()
            assert server.post(TEXT, CONTINUE).status_code == 200
            assert time.monotonic() - begun_s < 1
            time.sleep(1)
        for each in slow:
            with closing(each):
                each.settimeout(5)
                answer = b"".join(iter(lambda: each.recv(10_000), b""))  # noqa: B023
                assert answer.startswith(b"HTTP/1.1 408") and b"body_too_slow" in answer


def told_while_sending(server: Serving, head: bytes, limit_s: float) -> bytes:
    """Return what a client is told that sends a body's bytes until it is cut off."""
    address = urlsplit(server.url)
    told = bytearray()
    with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
        connection.settimeout(0.1)
        connection.sendall(head + b"Host: localhost\r\nContent-Length: 999\r\n\r\n")
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < limit_s:
            try:
                connection.sendall(b" ")
                part = connection.recv(10_000)
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                return bytes(told)
            if not part:
                return bytes(told)
            told += part
    raise AssertionError(f"still open {limit_s} s after {bytes(told)!r}")


def test_a_client_that_sends_on_after_its_408_is_cut_off(
    float_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guard, "body_s", 0.5)
    with serving(float_gguf) as server:
        answer = told_while_sending(server, b"POST /v1/completions HTTP/1.1\r\n", 3)
    assert answer.startswith(b"HTTP/1.1 408") and b"body_too_slow" in answer
    assert b"connection: close" in answer.lower()


def test_a_client_that_sends_on_after_its_refusal_is_cut_off(
    float_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TimedH11, "rest_s", 0.5)
    options = ServeOptions(alias="tiny", api_key="secret")
    with serving(float_gguf, options) as server:
        answer = told_while_sending(server, b"POST /v1/completions HTTP/1.1\r\n", 3)
        assert answer.startswith(b"HTTP/1.1 401")
        # Who ends the body in time goes on with the same connection.
        with httpx.Client(headers={"Authorization": "Bearer secret"}) as client:
            assert client.get(server.url + "/health").status_code == 200
            time.sleep(0.7)
            assert client.get(server.url + "/health").status_code == 200


@contextmanager
def held_up(server: Serving) -> Iterator[None]:
    """Let the engine's process wait, in the midst of its start."""
    while (pid := server.engine.pid) is None:
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_until_the_model_is_ready_the_answer_is_503(float_gguf: Path) -> None:
    with serving(float_gguf, wait=False) as server:
        with held_up(server):
            response = server.get("/health")
            refused(response, 503, "engine_unavailable")
            assert response.headers["Retry-After"]
            refused(server.post(TEXT, CONTINUE), 503, "engine_unavailable")
        server.engine.wait_ready(60)
        assert server.get("/health").json() == {"status": "ok"}


def test_sigterm_lets_running_streams_end(float_gguf: Path) -> None:
    command = [sys.executable, "-m", "edgekd", "serve", str(float_gguf), "--port", "0", "--json"]
    process = subprocess.Popen(
        [*command, "--ctx", "1024"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout
        url = json.loads(process.stdout.readline())["url"]
        asked = LONG | {"max_tokens": 900}
        with httpx.stream("POST", url + TEXT, json=asked, timeout=60) as response:
            lines = response.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        process.communicate(timeout=30)
    assert rest[-1] == "data: [DONE]" and len([first, *rest]) > 100
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")
