"""OpenAI's own Python client against ``edgekd serve``: what works, each with a check.

    edgekd serve student.gguf
    python client.py http://127.0.0.1:8080/v1

Needs ``pip install openai``. Prints one line for each feature; exits with 1 where one fails.
The part about tools is left out where the model's chat template knows no tools.
"""

import json
import sys
from collections.abc import Callable

import openai
from openai import OpenAI

MESSAGES = [{"role": "user", "content": "The quick brown fox"}]
ANSWER = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def chat(client: OpenAI, model: str) -> None:
    """Ask, and get a reply with its token counts."""
    reply = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=16)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def stream(client: OpenAI, model: str) -> None:
    """Get the same text part by part."""
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 16, "seed": 1}
    whole = client.chat.completions.create(**asked)
    parts = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(choice.delta.content or "" for part in parts for choice in part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens


def tools(client: OpenAI, model: str) -> None:
    """Make the model call a function, whole and streamed, and hand back the result."""
    asked = {"model": model, "messages": MESSAGES, "tools": [WEATHER], "max_tokens": 100}
    reply = client.chat.completions.create(**asked, tool_choice="required")
    message = reply.choices[0].message
    (call,) = message.tool_calls
    assert reply.choices[0].finish_reason == "tool_calls" and call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    with client.chat.completions.stream(**asked, tool_choice="required") as events:
        streamed = events.get_final_completion().choices[0].message.tool_calls[0]
    assert json.loads(streamed.function.arguments)["city"] in ("Paris", "Rome")
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    asked["messages"] = [*MESSAGES, message, result]
    assert client.chat.completions.create(**asked).choices[0].message.role == "assistant"


def json_schema(client: OpenAI, model: str) -> None:
    """Get JSON that fits a schema."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}
    reply = client.chat.completions.create(
        model=model, messages=MESSAGES, response_format=form, max_tokens=100
    )
    assert json.loads(reply.choices[0].message.content)["answer"] in ("yes", "no")


def logprobs(client: OpenAI, model: str) -> None:
    """See how likely each token was, and its rivals."""
    reply = client.chat.completions.create(
        model=model, messages=MESSAGES, logprobs=True, top_logprobs=3, max_tokens=8, temperature=0
    )
    for token in reply.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0
    plain = client.completions.create(model=model, prompt="The", logprobs=2, max_tokens=4)
    assert len(plain.choices[0].logprobs.tokens) == plain.usage.completion_tokens


def stop(client: OpenAI, model: str) -> None:
    """End a text before a string."""
    asked = {"model": model, "prompt": "The quick brown", "max_tokens": 24, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    mark = text[4:9]
    reply = client.completions.create(**asked, stop=[mark]).choices[0]
    assert reply.text == text[: text.find(mark)] and reply.finish_reason == "stop"


def seed(client: OpenAI, model: str) -> None:
    """Draw the same text twice, and another one with another seed."""
    asked = {"model": model, "prompt": "The quick brown", "max_tokens": 24, "temperature": 1}
    first, again, other = (
        client.completions.create(**asked, seed=number).choices[0].text for number in (7, 7, 8)
    )
    assert first == again != other


def errors(client: OpenAI, model: str) -> None:
    """Get exceptions of the right class, with a message."""
    create = client.chat.completions.create
    expected = {
        openai.NotFoundError: {"model": "no-such-model"},
        openai.BadRequestError: {"temperature": 9},
    }
    for kind, wrong in expected.items():
        try:
            create(**{"model": model, "messages": MESSAGES} | wrong)
        except kind as error:
            assert error.body["message"] and error.body["code"]
        else:
            raise AssertionError(f"{wrong} was accepted")


def knows_tools(client: OpenAI, model: str) -> bool:
    """Whether the model's chat template can show it tools."""
    try:
        client.chat.completions.create(
            model=model, messages=MESSAGES, tools=[WEATHER], max_tokens=1
        )
    except openai.UnprocessableEntityError:
        return False
    return True


def main(url: str, key: str = "none") -> int:
    """Try every feature; return the exit code."""
    client = OpenAI(base_url=url, api_key=key, max_retries=0)
    model = client.models.list().data[0].id
    features: list[Callable[[OpenAI, str], None]] = [chat, stream, json_schema, logprobs]
    features += [stop, seed, errors]
    if knows_tools(client, model):
        features.append(tools)
    n_failed = 0
    for feature in features:
        try:
            feature(client, model)
            print(f"{feature.__name__}: ok")
        except (AssertionError, openai.OpenAIError, ValueError) as error:
            print(f"{feature.__name__}: FAILED, {error!r}")
            n_failed += 1
    return min(n_failed, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
