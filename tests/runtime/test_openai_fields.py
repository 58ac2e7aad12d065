"""Fields of OpenAI's API that change what is generated or reported."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.serving import (
    CHAT,
    CONTINUE,
    HELLO,
    TEXT,
    TOOL_TEMPLATE,
    Json,
    Serving,
    choice,
    events,
    refused,
    serving,
)

GREEDY = CONTINUE | {"temperature": 0, "ignore_eos": True, "cache_prompt": False}
WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"City": {"enum": ["Paris", "Rome"]}},
        },
    },
}


@pytest.fixture(scope="module", params=["float_gguf", "float_onnx"])
def server(request: pytest.FixtureRequest) -> Iterator[Serving]:
    with serving(request.getfixturevalue(request.param)) as found:
        yield found


@pytest.fixture(scope="module")
def tool_server(float_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(float_onnx, folder)
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    with serving(folder, context_tokens=512) as found:
        yield found


def test_choices_are_drawn_with_seeds_of_their_own(server: Serving) -> None:
    asked = CONTINUE | {"n": 3, "temperature": 1.5, "cache_prompt": False}
    found = server.post(TEXT, asked).json()
    texts = [each["text"] for each in found["choices"]]
    assert [each["index"] for each in found["choices"]] == [0, 1, 2] and len(set(texts)) == 3
    assert choice(server.post(TEXT, asked | {"n": 1, "seed": 5}))["text"] == texts[1]
    parts = events(server.post(TEXT, asked | {"stream": True}))
    for index, text in enumerate(texts):
        said = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in said) == text
        assert said[-1]["finish_reason"]


def test_several_prompts_are_answered_in_their_order(server: Serving) -> None:
    ids = server.post("/tokenize", {"content": "def add"}).json()["tokens"]
    found = server.post(TEXT, GREEDY | {"prompt": ["The quick", ids], "n": 2}).json()
    assert [each["index"] for each in found["choices"]] == [0, 1, 2, 3]
    alone = choice(server.post(TEXT, GREEDY | {"prompt": "def add"}))["text"]
    assert found["choices"][2]["text"] == found["choices"][3]["text"] == alone
    assert found["usage"]["completion_tokens"] == 4 * 24


def test_more_texts_than_can_ever_wait_are_refused_for_good(server: Serving) -> None:
    response = server.post(TEXT, GREEDY | {"prompt": ["a"] * 36})
    assert "36 texts in one request, 35" in refused(response, 400, "invalid_value")


def test_chat_logprobs_name_each_token_and_its_rivals(server: Serving) -> None:
    asked = HELLO | {"logprobs": True, "top_logprobs": 3, "temperature": 0, "ignore_eos": True}
    found = choice(server.post(CHAT, asked))
    content = found["logprobs"]["content"]
    assert len(content) == 24
    for token in content:
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0
        assert len(token["top_logprobs"]) == 3
    raw = b"".join(bytes(token["bytes"]) for token in content)
    assert raw.decode("utf-8", "replace") == found["message"]["content"]
    parts = events(server.post(CHAT, asked | {"stream": True}))
    streamed = [
        entry
        for part in parts
        if (logprobs := part["choices"][0]["logprobs"])
        for entry in logprobs["content"]
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]


def test_echo_scores_the_prompt_as_a_second_request_scores_its_words(server: Serving) -> None:
    made = choice(server.post(TEXT, GREEDY | {"logprobs": 2}))
    asked = {"prompt": "The quick brown" + made["text"], "max_tokens": 0, "echo": True}
    found = choice(server.post(TEXT, asked | {"logprobs": 2}))
    assert found["text"] == asked["prompt"]
    scored = found["logprobs"]
    assert scored["token_logprobs"][0] is None and scored["top_logprobs"][0] is None
    assert scored["text_offset"][0] == 0
    if scored["tokens"][-24:] == made["logprobs"]["tokens"]:  # else the text splits otherwise
        assert scored["token_logprobs"][-24:] == pytest.approx(
            made["logprobs"]["token_logprobs"], abs=1e-3
        )
    assert all(math.isfinite(each) for each in scored["token_logprobs"][1:])
    assert server.post(TEXT, asked).json()["usage"]["completion_tokens"] == 0


def test_a_teacher_can_be_read_through_the_api(server: Serving) -> None:
    asked = {
        "prompt": [5, 9, 80, 44],
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 4,
        "logprobs": 4,
        "echo": True,
        "return_tokens_as_token_ids": True,
    }
    found = choice(server.post(TEXT, asked))
    rows = found["prompt_logprobs"]
    assert rows[0] is None and len(rows) == 4
    assert all(str(i) in row for row, i in zip(rows[1:], (9, 80, 44), strict=True))
    assert all(len(row) in (4, 5) for row in rows[1:])
    assert found["logprobs"]["tokens"][:4] == [
        "token_id:5",
        "token_id:9",
        "token_id:80",
        "token_id:44",
    ]
    first = {
        int(key.partition(":")[2]): p for key, p in found["logprobs"]["top_logprobs"][1].items()
    }
    assert first == {int(key): row["logprob"] for key, row in rows[1].items()}


def test_bias_and_penalties_change_the_text(server: Serving) -> None:
    text = choice(server.post(TEXT, GREEDY))["text"]
    first = server.post(
        "/completion",
        {"prompt": "The quick brown", "n_predict": 1, "temperature": 0, "return_tokens": True},
    ).json()["tokens"][0]
    banned = choice(server.post(TEXT, GREEDY | {"logit_bias": {str(first): -100}}))["text"]
    assert banned != text
    for penalty in ("frequency_penalty", "presence_penalty"):
        assert choice(server.post(TEXT, GREEDY | {penalty: 2})) != choice(server.post(TEXT, GREEDY))


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_fits_the_schema(server: Serving, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    asked = HELLO | {"response_format": form, "max_tokens": 100, "stream": stream}
    response = server.post(CHAT, asked)
    if stream:
        deltas = [part["choices"][0]["delta"] for part in events(response)]
        text = "".join(delta.get("content", "") for delta in deltas)
    else:
        text = choice(response)["message"]["content"]
    assert json.loads(text)["answer"] in ("yes", "no")


def test_a_schema_that_would_blow_up_is_refused(server: Serving) -> None:
    nested: Json = {"type": "string", "maxLength": 100_000}
    for schema in (nested, {"$ref": "#/nowhere"}, {"type": "no type"}):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        response = server.post(CHAT, HELLO | {"response_format": form})
        assert response.status_code == 400, response.text
    for _ in range(70):
        nested = {"items": nested}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": nested}}
    assert "deeper" in refused(
        server.post(CHAT, HELLO | {"response_format": form}), 400, "invalid_request"
    )


@pytest.mark.parametrize(
    "choose", ["required", {"type": "function", "function": {"name": "weather"}}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_is_made_and_fits_its_schema(
    tool_server: Serving, choose: object, stream: bool
) -> None:
    asked = HELLO | {"tools": [WEATHER], "tool_choice": choose, "max_tokens": 100, "stream": stream}
    response = tool_server.post(CHAT, asked)
    if stream:
        parts = [part["choices"][0] for part in events(response)]
        (call,) = [c for part in parts for c in part["delta"].get("tool_calls", ())]
        reason, text = parts[-1]["finish_reason"], None
        assert call["index"] == 0
    else:
        found = choice(response)
        (call,), text = found["message"]["tool_calls"], found["message"]["content"]
        reason = found["finish_reason"]
    assert (reason, text) == ("tool_calls", None)
    assert call["id"].startswith("call_") and call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")


def test_the_template_shows_tools_calls_and_results(tool_server: Serving) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    asked = {"messages": messages, "tools": [WEATHER]}
    prompt = tool_server.post("/apply-template", asked).json()["prompt"]
    assert prompt.startswith('tools [{"type": "function"') and '"weather"' in prompt
    assert prompt.endswith("user: Hi\nassistant: Oslo\ntool: rain\nassistant: ")
    hidden = tool_server.post("/apply-template", asked | {"tool_choice": "none"}).json()["prompt"]
    assert hidden.startswith("user: Hi")


def test_tools_need_a_template_that_knows_them(server: Serving) -> None:
    response = server.post(CHAT, HELLO | {"tools": [WEATHER]})
    assert "knows no tools" in refused(response, 422, "model_cannot")
    for wrong in (
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "x"}}},
    ):
        refused(server.post(CHAT, HELLO | wrong), 400, "invalid_request")
