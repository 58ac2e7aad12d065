"""llama-server's fields on its own route and on OpenAI's, where its clients send them too."""

import json
from collections.abc import Iterator

import pytest

from tests.runtime.serving import CHAT, CONTINUE, HELLO, TEXT, Json, Serving, serving

NATIVE = "/completion"
SHORT: Json = {"max_tokens": 12, "cache_prompt": False}
BODIES: dict[str, Json] = {
    CHAT: HELLO | SHORT,
    TEXT: CONTINUE | SHORT,
    NATIVE: {"prompt": "The quick brown", "seed": 4} | SHORT,
}
README_SAMPLERS = ["dry", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]
LONG = "jumps over the lazy dog " * 8


@pytest.fixture(scope="module", params=["float_gguf", "float_onnx"])
def server(request: pytest.FixtureRequest) -> Iterator[Serving]:
    with serving(request.getfixturevalue(request.param)) as found:
        yield found


def said(server: Serving, route: str, **fields: object) -> str:
    """Return the text of an answer."""
    response = server.post(route, BODIES[route] | fields)
    assert response.status_code == 200, response.text
    found = response.json()
    if route == NATIVE:
        return str(found["content"])
    choice = found["choices"][0]
    return str(choice["message"]["content"] if route == CHAT else choice["text"])


def parts_of(server: Serving, route: str, **fields: object) -> list[Json]:
    """Return the parts of a stream."""
    response = server.post(route, BODIES[route] | {"stream": True} | fields)
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def text_in(part: Json) -> str:
    """Return what one part of a stream adds to the text."""
    if "choices" not in part:
        return str(part["content"])
    (choice,) = part["choices"]
    return str(choice["text"] if "text" in choice else choice["delta"].get("content", ""))


@pytest.mark.parametrize("route", BODIES)
def test_the_list_of_samplers_in_the_readme_is_the_chain_without_penalties(
    server: Serving, route: str
) -> None:
    plain = said(server, route, repeat_penalty=1.0)
    assert said(server, route, repeat_penalty=1.5) != plain
    assert said(server, route, repeat_penalty=1.5, samplers=README_SAMPLERS) == plain
    full = ["penalties", "dry", "top_n_sigma", *README_SAMPLERS[1:]]
    punished = said(server, route, repeat_penalty=1.5, samplers=full)
    assert punished == said(server, route, repeat_penalty=1.5)
    assert punished == said(server, route, repeat_penalty=1.5, samplers="edskypmxt")


@pytest.mark.parametrize("route", BODIES)
def test_samplers_that_are_not_named_are_off(server: Serving, route: str) -> None:
    narrow = said(server, route, top_k=1)
    assert narrow == said(server, route, temperature=0)
    assert said(server, route, top_k=1, samplers=["top_p", "temperature"]) != narrow
    hot = {"temperature": 2.0, "top_k": 0, "min_p": 0, "top_p": 1}
    assert said(server, route, **hot, samplers=["top_k"]) == said(
        server, route, **hot | {"temperature": 1.0}
    )


@pytest.mark.parametrize("route", BODIES)
def test_timings_come_with_the_answer_and_with_each_token_where_wanted(
    server: Serving, route: str
) -> None:
    whole = server.post(route, BODIES[route]).json()["timings"]
    assert whole["prompt_n"] > 0 and whole["predicted_n"] > 1
    assert whole["predicted_ms"] > 0 and whole["predicted_per_second"] > 0
    *parts, last = parts_of(server, route)
    assert not any("timings" in part for part in parts)
    assert last["timings"].keys() == whole.keys()
    assert last["timings"]["predicted_n"] == whole["predicted_n"]

    timed = [part for part in parts_of(server, route, timings_per_token=True) if text_in(part)]
    counts = [part["timings"]["predicted_n"] for part in timed]
    assert counts == sorted(counts) and counts[0] < counts[-1] <= whole["predicted_n"]
    times_ms = [part["timings"]["predicted_ms"] for part in timed]
    assert times_ms == sorted(times_ms) and times_ms[-1] > 0
    assert all(part["timings"]["prompt_ms"] > 0 for part in timed)


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_the_part_that_counts_tokens_has_timings_too(server: Serving, route: str) -> None:
    last = parts_of(server, route, stream_options={"include_usage": True})[-1]
    assert last["choices"] == []
    assert last["timings"]["predicted_n"] == last["usage"]["completion_tokens"]


@pytest.mark.parametrize("route", BODIES)
def test_a_stream_tells_how_much_of_the_prompt_is_read(server: Serving, route: str) -> None:
    name, value = ("messages", [{"role": "user", "content": LONG}])
    if route != CHAT:
        name, value = "prompt", LONG  # type: ignore[assignment]
    asked = {name: value, "id_slot": 0, "return_progress": True}
    for is_cached in (False, True):
        parts = parts_of(server, route, **asked | {"cache_prompt": is_cached})
        found = [part["prompt_progress"] for part in parts if "prompt_progress" in part]
        first_text = next(place for place, part in enumerate(parts) if text_in(part))
        assert found and "prompt_progress" not in parts[first_text]
        assert found[-1]["processed"] == found[-1]["total"] > found[-1]["cache"]
        assert (found[-1]["cache"] > 0) == is_cached
        assert found[0]["processed"] > found[0]["cache"] and found[-1]["time_ms"] >= 0
    assert not any("prompt_progress" in part for part in parts_of(server, route))


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_openais_routes_take_llama_servers_fields(server: Serving, route: str) -> None:
    plain = said(server, route)
    idle = {
        "typical_p": 1.0,
        "repeat_last_n": 64,
        "mirostat": 0,
        "mirostat_tau": 5.0,
        "dry_multiplier": 0.0,
        "dry_base": 1.75,
        "xtc_probability": 0.0,
        "top_n_sigma": -1,
        "n_keep": 0,
        "t_max_predict_ms": 0,
        "lora": [],
        "n_cmpl": 1,
        "n_probs": 0,
        "grammar": "",
        "json_schema": None,
        "return_tokens": False,
    }
    assert said(server, route, **idle) == plain
    assert said(server, route, typical_p=0.1) != plain
    punished = said(server, route, repeat_penalty=1.5)
    assert said(server, route, repeat_penalty=1.5, repeat_last_n=0) == plain != punished
    schema = {"enum": ["x1", "x2"]}
    assert json.loads(said(server, route, json_schema=schema)) in ("x1", "x2")


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_limits_are_named_as_llama_server_names_them(server: Serving, route: str) -> None:
    def n_made(**fields: object) -> int:
        asked = BODIES[route] | {"ignore_eos": True} | fields
        return int(server.post(route, asked).json()["usage"]["completion_tokens"])

    assert n_made(n_predict=3) == 3
    assert n_made(max_completion_tokens=5, max_tokens=7) == 5
    assert n_made(max_tokens=-1) > 200  # the context holds 256
    assert len({said(server, route, seed=-1, temperature=2) for _ in range(3)}) > 1


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_probabilities_have_llama_servers_form_beside_openais(server: Serving, route: str) -> None:
    asked = BODIES[route] | {"n_probs": 30, "temperature": 0}
    logprobs = server.post(route, asked).json()["choices"][0]["logprobs"]
    for token in logprobs["content"]:
        best = token["top_logprobs"]
        assert len(best) == 30 and best[0]["id"] == token["id"]
        assert best[0]["logprob"] == token["logprob"] > best[29]["logprob"]
    if route == TEXT:
        assert len(logprobs["tokens"]) == len(logprobs["content"])


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_biases_may_be_pairs_texts_and_false(server: Serving, route: str) -> None:
    def chosen(**fields: object) -> list[Json]:
        asked = BODIES[route] | {"temperature": 0, "n_probs": 1, "ignore_eos": True} | fields
        return list(server.post(route, asked).json()["choices"][0]["logprobs"]["content"])

    plain = chosen()
    whole = next(each for each in plain if len(each["token"]) > 2 and each["token"].isascii())
    text, token_id = whole["token"], whole["id"]
    assert server.post("/tokenize", {"content": text}).json()["tokens"] == [token_id]
    for bias in ([[token_id, False]], {str(token_id): -100}, [[text, False]], {text: -100}):
        assert token_id not in [each["id"] for each in chosen(logit_bias=bias)]
