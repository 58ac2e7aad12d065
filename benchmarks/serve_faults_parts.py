"""The parts of benchmarks/serve_faults.py: each breaks something and returns what it measured."""

import argparse
import json
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

Json = dict[str, Any]
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
N_STREAMS = 8
N_SLOW = 50
RECOVERY_S, FREE_S, MEMORY_GROWTH = 5.0, 2.0, 0.05
PROBE: Json = {"prompt": "The", "max_tokens": 1}


@dataclass(frozen=True)
class Server:
    """A server that runs as a process of its own."""

    url: str
    pid: int

    def post(self, route: str, asked: Json) -> httpx.Response:
        """Return the answer to ``asked``."""
        return httpx.post(self.url + route, json=asked, timeout=300)

    def engine(self) -> psutil.Process | None:
        """Return the engine process, where there is one."""
        for each in psutil.Process(self.pid).children():
            with suppress(psutil.Error):  # it has ended, and nobody took note yet
                if "edgekd.runtime.engine_worker" in each.cmdline():
                    return each
        return None

    def n_busy(self) -> int:
        """Return how many slots work on a text."""
        slots = httpx.get(self.url + "/slots", timeout=60).json()
        return sum(slot["is_processing"] for slot in slots)


def kills(server: Server, asked: argparse.Namespace) -> Json:
    """Kill the engine under load; every stream may only hold its own text, whole or cut off.

    Each client's grammar allows one word of its own again and again, so that text of another
    stream shows whatever the model says.
    """
    recoveries_s, outcomes = [], {"whole": 0, "cut": 0, "refused": 0, "wrong": 0}
    stop = threading.Event()

    def client(number: int) -> None:
        word = f"{number} {chr(ord('a') + number) * 3}. "
        grammar = f'root ::= ("{word}")+'
        body = {"prompt": f"Say {word}:", "max_tokens": 64, "ignore_eos": True, "stream": True}
        while not stop.is_set():
            outcome = _stream(server, body | {"grammar": grammar}, word)
            outcomes[outcome] += 1
            if outcome == "refused":
                time.sleep(0.2)

    with ThreadPoolExecutor(N_STREAMS) as pool:
        clients = [pool.submit(client, number) for number in range(N_STREAMS)]
        draw = random.Random(3)
        try:
            for _ in range(asked.kills):
                _wait(lambda: server.n_busy() == asked.parallel, 60)
                time.sleep(draw.uniform(0.3, 1.0))
                recoveries_s.append(_kill(server))
        finally:
            stop.set()
        for each in clients:
            each.result()
    worst_s = max(recoveries_s)
    return {
        "n_kills": len(recoveries_s),
        "recovery_s_median": round(statistics.median(recoveries_s), 3),
        "recovery_s_worst": round(worst_s, 3),
        "streams": outcomes,
        "ok": outcomes["wrong"] == 0 and outcomes["cut"] > 0 and worst_s < RECOVERY_S,
    }


def flood(server: Server, asked: argparse.Namespace) -> Json:
    """Let many clients ask at once; every answer is complete, or says when to come back."""
    body = {"prompt": "The", "max_tokens": 32, "ignore_eos": True}
    with ThreadPoolExecutor(asked.clients) as pool:
        answers = list(pool.map(lambda _: server.post(TEXT, body), range(2 * asked.clients)))
    n_whole = sum(
        each.status_code == 200 and each.json()["usage"]["completion_tokens"] == 32
        for each in answers
    )
    n_later = sum(
        each.status_code in (429, 503) and int(each.headers.get("Retry-After", 0)) > 0
        for each in answers
    )
    counts = {"n_asked": len(answers), "n_whole": n_whole, "n_told_to_retry": n_later}
    return counts | {"ok": n_whole + n_later == len(answers) and n_whole > 0}


def gone(server: Server, asked: argparse.Namespace) -> Json:
    """Hang up in mid-stream; the slot must be free soon after."""
    body = {"prompt": "The", "max_tokens": 400, "ignore_eos": True, "stream": True}
    freed_s = []
    for _ in range(10):
        with httpx.stream("POST", server.url + TEXT, json=body, timeout=60) as response:
            next(response.iter_lines())
        begun_s = time.monotonic()
        _wait(lambda: server.n_busy() == 0, 30)
        freed_s.append(time.monotonic() - begun_s)
    worst_s = max(freed_s)
    median_s = statistics.median(freed_s)
    return {
        "slot_free_s_median": round(median_s, 3),
        "slot_free_s_worst": round(worst_s, 3),
        "ok": worst_s < FREE_S,
    }


def slow(server: Server, asked: argparse.Namespace) -> Json:
    """Open connections that send a byte a second; others must not notice them."""
    alone_s = _latencies_s(server, 30)
    address = urlsplit(server.url)
    assert address.hostname and address.port
    place = (address.hostname, address.port)
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\n".encode()
    heads = [_open(place, head) for _ in range(N_SLOW)]
    bodies = [_open(place, head + b"Content-Length: 999\r\n\r\n") for _ in range(N_SLOW)]
    beside_s: list[float] = []
    begun_s = time.monotonic()
    while time.monotonic() - begun_s < 33:  # longer than the limits of head and body
        for each in (*heads, *bodies):
            with suppress(OSError):
                each.sendall(b"x")
        beside_s += _latencies_s(server, 3)
        time.sleep(1)
    n_closed = sum(_answer(each) == b"" for each in heads)
    n_408 = sum(_answer(each).startswith(b"HTTP/1.1 408") for each in bodies)
    return {
        "latency_s_median_alone": round(statistics.median(alone_s), 4),
        "latency_s_median_beside": round(statistics.median(beside_s), 4),
        "latency_s_worst_beside": round(max(beside_s), 4),
        "slow_heads_closed": n_closed,
        "slow_bodies_told_408": n_408,
        "ok": n_closed == n_408 == N_SLOW and max(beside_s) < max(alone_s) + 1,
    }


def memory(server: Server, asked: argparse.Namespace) -> Json:
    """Compare memory after a tenth of the requests and after all of them."""
    early = asked.requests // 10
    _ask_many(server, range(early), asked.parallel)
    before = _memory_bytes(server)
    _ask_many(server, range(early, asked.requests), asked.parallel)
    after = _memory_bytes(server)
    growth = {name: round(after[name] / before[name] - 1, 4) for name in before}
    return {
        "n_early": early,
        "n_requests": asked.requests,
        "bytes_early": before,
        "bytes_late": after,
        "growth": growth,
        "ok": max(growth.values()) < MEMORY_GROWTH,
    }


def _stream(server: Server, body: Json, word: str) -> str:
    """Return how one stream went."""
    text, error = "", None
    try:
        with httpx.stream("POST", server.url + TEXT, json=body, timeout=120) as response:
            if response.status_code != 200:
                is_polite = response.status_code in (429, 503) and "retry-after" in response.headers
                return "refused" if is_polite else "wrong"
            for line in response.iter_lines():
                if not line or line == "data: [DONE]":
                    continue
                part = json.loads(line.removeprefix("data: "))
                error = part.get("error", error)
                text += "".join(choice["text"] for choice in part.get("choices", ()))
    except httpx.HTTPError:
        return "wrong"
    if not (word * (len(text) // len(word) + 1)).startswith(text):
        return "wrong"
    if error:
        return "cut" if error["code"] == "engine_died" else "wrong"
    return "whole"


def _kill(server: Server) -> float:
    """Kill the engine; return the seconds until a text is made again."""
    engine = server.engine()
    assert engine
    engine.kill()
    begun_s = time.monotonic()
    _wait(lambda: (found := server.engine()) is not None and found.pid != engine.pid, 60)
    _wait(lambda: httpx.get(server.url + "/health", timeout=60).status_code == 200, 60)
    # The other clients fill the queue at once; a seat among them is enough.
    _wait(lambda: server.n_busy() > 0, 60)
    return time.monotonic() - begun_s


def _ask_many(server: Server, numbers: Sequence[int], n_clients: int) -> None:
    """Ask for short texts of every kind."""
    with httpx.Client(base_url=server.url, timeout=300) as client:

        def ask(number: int) -> None:
            text = f"Request {number}: " + "word " * (number % 40)
            body: Json = {"max_tokens": 1 + number % 4, "stream": number % 3 == 0}
            if number % 5 == 0:
                body |= {"response_format": {"type": "json_object"}}
            if number % 7 == 0:
                body |= {"stop": ["e"], "seed": number}
            if number % 2:
                route, body = CHAT, body | {"messages": [{"role": "user", "content": text}]}
            else:
                route, body = TEXT, body | {"prompt": text, "logprobs": 3}
            response = client.post(route, json=body)
            assert response.status_code == 200, response.text

        with ThreadPoolExecutor(n_clients) as pool:
            list(pool.map(ask, numbers))


def _memory_bytes(server: Server) -> Json:
    """Return what only this process holds (USS), and its share of the rest (PSS)."""
    time.sleep(1)
    engine = server.engine()
    assert engine
    found = {}
    for name, process in (("server", psutil.Process(server.pid)), ("engine", engine)):
        sizes = process.memory_full_info()
        found[f"{name}_uss"] = sizes.uss
        if hasattr(sizes, "pss"):  # Linux
            found[f"{name}_pss"] = sizes.pss
    return found


def _latencies_s(server: Server, n_times: int) -> list[float]:
    found = []
    for _ in range(n_times):
        begun_s = time.monotonic()
        assert server.post(TEXT, PROBE).status_code == 200
        found.append(time.monotonic() - begun_s)
    return found


def _open(place: tuple[str, int], head: bytes) -> socket.socket:
    connection = socket.create_connection(place)
    connection.sendall(head)
    return connection


def _answer(connection: socket.socket) -> bytes:
    """Return what a connection was told until it was closed, or reset since more was sent."""
    told = b""
    with closing(connection), suppress(ConnectionResetError):
        connection.settimeout(5)
        try:
            while part := connection.recv(4096):
                told += part
        except TimeoutError:
            return b"still open after " + told
    return told


def _wait(is_true: Callable[[], bool], limit_s: float) -> None:
    begun_s = time.monotonic()
    while not is_true():
        if time.monotonic() - begun_s > limit_s:
            raise TimeoutError(f"nothing happened within {limit_s} s")
        time.sleep(0.02)
