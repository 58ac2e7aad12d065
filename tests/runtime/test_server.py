import asyncio
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn

from edgekd.errors import MissingExtraError, RecipeError
from edgekd.runtime.engine import Engine
from edgekd.runtime.http_guard import MAX_BODY_BYTES
from edgekd.runtime.loading import LoadedModel, open_model
from edgekd.runtime.server import create_app, serve
from edgekd.runtime.turns import MAX_WAITING

if TYPE_CHECKING:
    from edgekd.runtime.engine import Logits

Json = dict[str, Any]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "The quick brown"}], "max_tokens": 24, "seed": 4}
CONTINUE = {"prompt": "The quick brown", "max_tokens": 24, "seed": 4}


class PacedEngine:
    """A real engine at the pace of a small device, so that there is time to interrupt it."""

    def __init__(self, engine: Engine, seconds: float = 0.02) -> None:
        self.name, self.vocab_size = engine.name, engine.vocab_size
        self.context_tokens = engine.context_tokens
        self._engine, self._seconds = engine, seconds
        self.n_calls = 0

    @property
    def position(self) -> int:
        return self._engine.position

    def forward(self, ids: Sequence[int], *, every_logit: bool = False) -> "Logits":
        time.sleep(self._seconds)
        self.n_calls += 1
        logits = self._engine.forward(ids, every_logit=every_logit)
        logits[..., 2] = -100.0  # the stop token: the text goes on until it is cut
        return logits

    def rewind(self, position: int = 0) -> None:
        self._engine.rewind(position)

    def close(self) -> None:
        self._engine.close()


@pytest.fixture(scope="module", params=["tiny_gguf", "tiny_onnx"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return open_model(request.getfixturevalue(request.param), context_tokens=256, n_threads=1)


@pytest.fixture(scope="module")
def url(loaded: LoadedModel) -> Iterator[str]:
    with running(loaded) as address:
        yield address


@contextmanager
def running(loaded: LoadedModel, api_key: str | None = None) -> Iterator[str]:
    """A real server in a thread."""
    app = create_app(loaded, "tiny", api_key)
    config = uvicorn.Config(app, port=0, log_level="critical", ws="none", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
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
    assert set(error) == {"message", "type", "code"}
    return str(error["message"])


def test_a_chat_reply_has_openais_shape(url: str) -> None:
    reply = httpx.post(url + CHAT, json=HELLO | {"model": "tiny", "user": "me"}).json()
    assert reply["id"].startswith("chatcmpl-") and reply["object"] == "chat.completion"
    assert abs(reply["created"] - time.time()) < 60 and reply["model"] == "tiny"
    choice = reply["choices"][0]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]
    assert choice["finish_reason"] in ("stop", "length")
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_streamed_chat_says_what_the_whole_reply_says(url: str) -> None:
    whole = httpx.post(url + CHAT, json=HELLO).json()
    parts = events(httpx.post(url + CHAT, json=HELLO | {"stream": True}))
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert deltas[0] == {"role": "assistant", "content": ""}
    text = "".join(delta.get("content", "") for delta in deltas)
    assert text == whole["choices"][0]["message"]["content"]
    assert parts[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert len({part["id"] for part in parts}) == 1


def test_a_streamed_text_says_what_the_whole_text_says_and_counts_it(url: str) -> None:
    whole = httpx.post(url + TEXT, json=CONTINUE).json()
    asked = CONTINUE | {"stream": True, "stream_options": {"include_usage": True}}
    *parts, last = events(httpx.post(url + TEXT, json=asked))
    text = "".join(part["choices"][0]["text"] for part in parts)
    assert text == whole["choices"][0]["text"]
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == [] and last["usage"] == whole["usage"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(url: str, stream: bool) -> None:
    asked = CONTINUE | {"temperature": 0}
    text = httpx.post(url + TEXT, json=asked).json()["choices"][0]["text"]
    stop = text[5:12]
    response = httpx.post(url + TEXT, json=asked | {"stop": stop, "stream": stream})
    parts = events(response) if stream else [response.json()]
    assert "".join(part["choices"][0]["text"] for part in parts) == text[: text.find(stop)]
    assert parts[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_model_is_listed_and_no_other_is_served(url: str) -> None:
    assert [model["id"] for model in httpx.get(url + "/v1/models").json()["data"]] == ["tiny"]
    response = httpx.post(url + CHAT, json=HELLO | {"model": "gpt-4"})
    assert "'tiny'" in refused(response, 404, "model_not_found")
    refused(httpx.get(url + "/v1/nothing"), 404, "invalid_request")


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function"}]},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"n": 2},
        {"grammar": "root ::= [a]"},
        {"presence_penalty": 0.5},
        {"temperature": 2.5},
        {"temperature": "1"},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"seed": -1},
        {"top_k": 2**70},
        {"stop": ["x"] * 17},
        {"stop": ""},
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    ],
)
def test_a_field_that_cannot_be_honored_is_refused_by_name(url: str, field: Json) -> None:
    response = httpx.post(url + CHAT, json=HELLO | field)
    assert next(iter(field)) in refused(response, 400, "invalid_request")


@pytest.mark.parametrize(
    "body", ["", "{", "[]", '{"prompt": "\\ud800"}', '{"prompt": "a", "\\ud800": 1}', "[" * 90000]
)
def test_a_malformed_body_is_refused(url: str, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    refused(httpx.post(url + TEXT, content=body, headers=headers), 400, "invalid_request")


def test_json_that_is_not_sent_as_json_is_refused(url: str) -> None:
    headers = {"Content-Type": "text/plain"}  # what a foreign web page can send unasked
    response = httpx.post(url + TEXT, content=json.dumps(CONTINUE), headers=headers)
    assert "Content-Type" in refused(response, 400, "invalid_request")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(url: str, value: str) -> None:
    body = f'{{"prompt": "a", "temperature": {value}}}'
    headers = {"Content-Type": "application/json"}
    refused(httpx.post(url + TEXT, content=body, headers=headers), 400, "invalid_request")


def test_fields_that_ask_for_what_is_done_anyway_are_accepted(url: str) -> None:
    asked = {"n": 1, "tools": [], "logprobs": False, "stop": None, "response_format": None}
    parts = [{"type": "text", "text": "The quick"}, {"type": "text", "text": " brown"}]
    messages = [{"role": "user", "content": parts, "name": None}]
    response = httpx.post(url + CHAT, json=HELLO | asked | {"messages": messages})
    expected = httpx.post(url + CHAT, json=HELLO).json()
    assert response.json()["choices"] == expected["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit_is_refused(url: str, stream: bool) -> None:
    response = httpx.post(url + TEXT, json={"prompt": "fox " * 300, "stream": stream})
    assert "256" in refused(response, 400, "context_length_exceeded")
    refused(httpx.post(url + TEXT, json={"prompt": "", "stream": stream}), 400, "invalid_value")


def test_a_body_over_one_megabyte_is_refused(loaded: LoadedModel) -> None:
    async def chunks(n_bytes: int) -> Any:
        for _ in range(n_bytes // 1024):
            yield b" " * 1024

    long = {"prompt": "x" * MAX_BODY_BYTES}
    refused(calling(loaded, [{"json": long}])[0], 413, "body_too_long")
    unannounced = {"content": chunks(MAX_BODY_BYTES + 1024)}
    refused(calling(loaded, [unannounced])[0], 413, "body_too_long")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", ""]
)
def test_a_foreign_host_header_is_refused(url: str, host: str) -> None:
    refused(httpx.get(url + "/v1/models", headers={"Host": host}), 403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080"])
def test_loopback_names_are_served(url: str, host: str) -> None:
    assert httpx.get(url + "/health", headers={"Host": host}).json() == {"status": "ok"}


def test_nothing_but_health_is_open_without_the_key(loaded: LoadedModel) -> None:
    with running(loaded, api_key="sécret") as url:
        assert httpx.get(url + "/health").status_code == 200
        for key in (b"", b"Bearer", b"Bearer wrong", b"Basic s\xc3\xa9cret", b"\xff"):
            response = httpx.get(url + "/v1/models", headers={b"Authorization": key})
            refused(response, 401, "invalid_api_key")
        right = {b"Authorization": "Bearer sécret".encode()}
        assert httpx.get(url + "/v1/models", headers=right).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_the_engine_within_a_token(
    loaded: LoadedModel, stream: bool
) -> None:
    engine = PacedEngine(loaded.engine)
    with running(dataclasses.replace(loaded, engine=engine)) as url:
        asked = {"prompt": "The", "max_tokens": 200, "stream": stream}
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.stream("POST", url + TEXT, json=asked, timeout=0.3) as response,
        ):
            next(response.iter_lines())
            raise httpx.ReadTimeout("seen enough")
        time.sleep(0.1)
        n_calls = engine.n_calls
        assert httpx.post(url + TEXT, json={"prompt": "The", "max_tokens": 2}).is_success
        assert 0 < n_calls < 40 and engine.n_calls == n_calls + 2


def calling(loaded: LoadedModel, requests: list[Json]) -> list[httpx.Response]:
    """Send all requests at once to an app without a socket."""
    transport = httpx.ASGITransport(create_app(loaded, "tiny", None), raise_app_exceptions=False)

    async def call() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            posts: list[Coroutine[Any, Any, httpx.Response]] = [
                client.post(TEXT, **request) for request in requests
            ]
            return await asyncio.gather(*posts)

    return asyncio.run(call())


def test_requests_wait_in_turn_and_those_too_many_are_sent_away(loaded: LoadedModel) -> None:
    paced = dataclasses.replace(loaded, engine=PacedEngine(loaded.engine))
    asked = {"json": {"prompt": "The", "max_tokens": 1}}
    responses = calling(paced, [asked] * (MAX_WAITING + 4))
    busy = [response for response in responses if response.status_code == 429]
    assert len(busy) in (2, 3) and sum(r.is_success for r in responses) == len(responses) - len(
        busy
    )
    assert all(int(response.headers["Retry-After"]) > 0 for response in busy)
    refused(busy[0], 429, "queue_full")


def test_replies_of_concurrent_requests_do_not_mix(url: str) -> None:
    prompts = [{"prompt": text, "max_tokens": 12, "temperature": 0} for text in ("a", "b", "c")]
    alone = [httpx.post(url + TEXT, json=asked).json()["choices"] for asked in prompts]

    async def together() -> list[httpx.Response]:
        async with httpx.AsyncClient() as client:
            return await asyncio.gather(*(client.post(url + TEXT, json=a) for a in prompts * 3))

    assert [reply.json()["choices"] for reply in asyncio.run(together())] == alone * 3


def test_a_failing_engine_gives_500_and_no_stack_trace(tiny_onnx: Any) -> None:
    broken = open_model(tiny_onnx, context_tokens=32, n_threads=1)
    broken.engine.close()
    response = calling(broken, [{"json": CONTINUE}])[0]
    assert "log" in refused(response, 500, "internal_error")


def test_other_machines_are_let_in_only_with_a_key(loaded: LoadedModel) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(RecipeError, match="API key"):
            serve(loaded, "tiny", host, 0, None)
    with pytest.raises(RecipeError, match="empty"):
        serve(loaded, "tiny", "0.0.0.0", 0, " ")


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_is_named_with_its_extra(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"edgekd\[serve\]"):
        serve(loaded, "tiny", "127.0.0.1", 0, None)
