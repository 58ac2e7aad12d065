import asyncio
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edgekd.errors import MissingExtraError, RecipeError
from edgekd.runtime.engine_worker import WorkerSettings
from edgekd.runtime.http_guard import MAX_BODY_BYTES
from edgekd.runtime.server import ServeOptions, serve
from tests.runtime.serving import (
    CHAT,
    CONTINUE,
    ENGINE,
    HELLO,
    TEXT,
    Json,
    Serving,
    events,
    refused,
    serving,
)


@pytest.fixture(scope="module", params=["float_gguf", "float_onnx"])
def server(request: pytest.FixtureRequest) -> Iterator[Serving]:
    with serving(request.getfixturevalue(request.param)) as found:
        yield found


@pytest.fixture
def url(server: Serving) -> str:
    return server.url


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
    alone = CONTINUE | {"cache_prompt": False}
    whole = httpx.post(url + TEXT, json=alone).json()
    asked = alone | {"stream": True, "stream_options": {"include_usage": True}}
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
    refused(httpx.get(url + "/v1/nothing"), 404, "not_found")


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function"}]},
        {"logprobs": 1},
        {"top_logprobs": 3},
        {"response_format": {"type": "json_schema"}},
        {"n": 0},
        {"functions": [{"name": "f"}]},
        {"presence_penalty": 2.5},
        {"logit_bias": {"1": 101}},
        {"temperature": 2.5},
        {"temperature": "1"},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"seed": -2},
        {"mirostat": 1},
        {"n_probs": 101},
        {"top_k": 2**70},
        {"stop": ["x"] * 17},
        {"stop": ""},
        {"messages": []},
        {"messages": [{"role": "robot", "content": "x"}]},
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
    refused(httpx.post(url + TEXT, json={"prompt": "", "stream": stream}), 400, "invalid_request")


def test_a_body_over_one_megabyte_is_refused(server: Serving) -> None:
    def chunks(n_bytes: int) -> Iterator[bytes]:
        for _ in range(n_bytes // 1024):
            yield b" " * 1024

    refused(server.post(TEXT, {"prompt": "x" * MAX_BODY_BYTES}), 413, "body_too_long")
    unannounced = chunks(MAX_BODY_BYTES + 1024)
    refused(httpx.post(server.url + TEXT, content=unannounced), 413, "body_too_long")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", ""]
)
def test_a_foreign_host_header_is_refused(url: str, host: str) -> None:
    refused(httpx.get(url + "/v1/models", headers={"Host": host}), 403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080"])
def test_loopback_names_are_served(url: str, host: str) -> None:
    assert httpx.get(url + "/health", headers={"Host": host}).json() == {"status": "ok"}


def test_nothing_but_health_and_the_page_is_open_without_the_key(float_gguf: Path) -> None:
    with serving(float_gguf, ServeOptions(alias="tiny", api_key="sécret")) as server:
        assert server.get("/health").status_code == 200
        for key in (b"", b"Bearer", b"Bearer wrong", b"Basic s\xc3\xa9cret", b"\xff"):
            for route in ("/v1/models", "/metrics", "/slots", "/openapi.json"):
                response = server.get(route, headers={b"Authorization": key})
                refused(response, 401, "invalid_api_key")
        right = "sécret".encode()
        for header in ({b"Authorization": b"Bearer " + right}, {b"X-Api-Key": right}):
            assert server.get("/v1/models", headers=header).status_code == 200


def test_replies_of_concurrent_requests_do_not_mix(url: str) -> None:
    prompts = [{"prompt": text, "max_tokens": 12, "temperature": 0} for text in ("a", "b", "c")]
    alone = [httpx.post(url + TEXT, json=asked).json()["choices"] for asked in prompts]

    async def together() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*(client.post(url + TEXT, json=a) for a in prompts * 3))

    assert [reply.json()["choices"] for reply in asyncio.run(together())] == alone * 3


def test_other_machines_are_let_in_only_with_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(RecipeError, match="API key"):
            ServeOptions(alias="tiny", host=host)
    with pytest.raises(RecipeError, match="empty"):
        ServeOptions(alias="tiny", host="0.0.0.0", api_key=" ")


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_is_named_with_its_extra(
    float_gguf: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    settings = WorkerSettings(model=str(float_gguf), options=ENGINE, max_waiting=1)
    with pytest.raises(MissingExtraError, match=r"edgekd\[serve\]"):
        serve(settings, ServeOptions(alias="tiny", port=0))


def test_the_api_is_documented(url: str) -> None:
    document = httpx.get(url + "/openapi.json").json()
    assert {CHAT, TEXT, "/health", "/metrics"} <= set(document["paths"])
    assert httpx.get(url + "/docs").status_code == 200
