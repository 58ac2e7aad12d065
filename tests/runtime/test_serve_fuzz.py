"""Malformed requests: each gets a 4xx with a message, and the server goes on answering."""

import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.runtime.serving import CHAT, CONTINUE, HELLO, TEXT, Json, Serving, serving

N_REQUESTS = 2000
NATIVE = "/completion"
BODIES: dict[str, Json] = {CHAT: HELLO, TEXT: CONTINUE, NATIVE: {"prompt": "The", "n_predict": 4}}
NOT_NUMBERS: list[Any] = [
    "1",
    [],
    {},
    [1],
    {"a": 1},
    True,
    float("nan"),
    float("inf"),
    -1e9,
    10**400,
]
NUMBERS = {
    CHAT: ["temperature", "top_p", "n", "seed", "max_tokens", "presence_penalty", "top_logprobs"],
    TEXT: ["temperature", "top_p", "n", "seed", "max_tokens", "logprobs", "top_k"],
    NATIVE: ["temperature", "top_p", "n_predict", "n_probs", "top_k", "id_slot", "repeat_penalty"],
}
NOT_TEXTS: list[Any] = [1, {}, [None], [{}], [""] * 100, "x" * 5000, [["a"]], 0.5, True]


@pytest.fixture(scope="module")
def server(float_gguf: Path) -> Iterator[Serving]:
    with serving(float_gguf) as found:
        yield found


def deep(draw: random.Random) -> Any:
    found: Any = 1
    for _ in range(draw.choice([100, 900, 5000])):
        found = draw.choice([[found], {"a": found}])
    return found


SCHEMAS: list[Any] = [
    {"type": "string", "maxLength": 100_000},
    {"type": "array", "items": {"type": "string"}, "minItems": 10**6},
    {"anyOf": [{"const": str(number)} for number in range(60_000)]},
    deep(random.Random(1)),
    {"$ref": "file:///etc/passwd"},
    {"type": "string", "pattern": "(a{9999}){9999}"},
    {"type": "nothing"},
]


def with_field(route: str, **fields: Any) -> bytes:
    return json.dumps(BODIES[route] | fields).encode()


def wrong_number(draw: random.Random, route: str) -> bytes:
    return with_field(route, **{draw.choice(NUMBERS[route]): draw.choice(NOT_NUMBERS)})


def wrong_stop(draw: random.Random, route: str) -> bytes:
    return with_field(route, stop=draw.choice(NOT_TEXTS))


def foreign_model(draw: random.Random, route: str) -> bytes:
    names = [
        "../../etc/passwd",
        "/etc/passwd",
        "tiny\u0000",
        "x" * 9999,
        "..",
        "C:\\tiny",
        "./tiny",
    ]
    return with_field(route, model=draw.choice(names))


def wrong_prompt(draw: random.Random, route: str) -> bytes:
    name = "prompt" if "prompt" in BODIES[route] else "messages"
    wrong: list[Any] = [None, 1, {}, [], [[]], [{}], [-1], [2**40], [["x", {}]], False, "\ud800"]
    return with_field(route, **{name: draw.choice(wrong)})


def wrong_grammar(draw: random.Random, route: str) -> bytes:
    wrong = ["(" * 20000 + ")" * 20000, "root ::= root", "root ::= x", 7, "root ::= [a]{1,99999}"]
    return with_field(route, grammar=draw.choice(wrong))


def wrong_schema(draw: random.Random, route: str) -> bytes:
    schema = draw.choice(SCHEMAS)
    if route == NATIVE:
        return with_field(route, json_schema=schema)
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return with_field(route, response_format=form)


def unknown_field(draw: random.Random, route: str) -> bytes:
    return with_field(route, **{"unknown" + str(draw.random()): 1})


def cut_short(draw: random.Random, route: str) -> bytes:
    raw = json.dumps(BODIES[route]).encode()
    cut = draw.randrange(1, len(raw))
    return raw[:cut] + draw.choice([b"", b"\xff", b"\x00", b"}}", b"]"])


def wrong_bias(draw: random.Random, route: str) -> bytes:
    wrong = [{"1": 1e9}, {"9" * 12: 1}, {"x" * 99: 2**70}, [[1]], 5, {"1": float("nan")}]
    return with_field(route, logit_bias=draw.choice(wrong))


def too_deep(draw: random.Random, route: str) -> bytes:
    if draw.random() < 0.5:
        return b'{"prompt": ' + b"[" * draw.choice([100, 5000, 90000])
    name = draw.choice(["prompt", "messages", "x"])
    depth = draw.choice([100, 900, 5000])
    return f'{{"{name}": {"[" * depth}{"]" * depth}}}'.encode()


def too_long(draw: random.Random, route: str) -> bytes:
    """Return a body of 10 MB; a few, since they take their time."""
    n_bytes = 10_000_000 if draw.random() < 0.1 else 1_100_000
    return b'{"prompt": "' + b"x" * n_bytes + b'"}'


KINDS = [
    wrong_number,
    wrong_stop,
    foreign_model,
    wrong_prompt,
    wrong_grammar,
    wrong_schema,
    unknown_field,
    cut_short,
    wrong_bias,
    too_deep,
    too_long,
]


def test_malformed_requests_are_told_what_is_wrong(server: Serving) -> None:
    draw = random.Random(5)
    headers = {"Content-Type": "application/json"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=30) as client:
        for number in range(N_REQUESTS):
            route = draw.choice(list(BODIES))
            kind = KINDS[number % len(KINDS)]
            body = kind(draw, route)
            response = client.post(route, content=body)
            case = (kind.__name__, route, body[:300], response.text[:300])
            assert 400 <= response.status_code < 500, case
            assert response.json()["error"]["message"], case
            if number % 100 == 0:
                assert server.post(TEXT, CONTINUE | {"max_tokens": 2}).status_code == 200
    assert server.engine.restarts == 0
    assert server.post(TEXT, CONTINUE).status_code == 200


@pytest.mark.parametrize("schema", SCHEMAS)
def test_schemas_that_would_blow_up_are_refused(server: Serving, schema: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    response = server.post(CHAT, HELLO | {"response_format": form})
    assert response.status_code in (400, 413), response.text[:300]
    assert server.engine.restarts == 0


@pytest.mark.parametrize(
    "header",
    [
        "Content-Length: -1",
        "Content-Length: " + "9" * 400,
        "X: " + "x" * 20000,
        "no header",
        "Host: a",
    ],
)
def test_nonsense_instead_of_http_is_refused(server: Serving, header: str) -> None:
    address = urlsplit(server.url)
    assert address.hostname and address.port
    with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
        connection.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize(
    ("method", "route", "status"),
    [
        ("DELETE", TEXT, 405),
        ("GET", TEXT, 405),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/v1/models/%2e%2e%2fetc", 404),
    ],
)
def test_routes_that_are_not_there_say_so(
    server: Serving, method: str, route: str, status: int
) -> None:
    response = httpx.request(method, server.url + route)
    assert response.status_code == status and response.json()["error"]["message"]
