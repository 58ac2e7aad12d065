"""Bytes to a request of the API: a route and a body whose fields the bytes choose.

Raw bytes would hardly ever pass the JSON parser; with the fields' own names and a stock of values
that are right, wrong and nearly right, every check behind it is reached.
"""

import json
from typing import Any

from edgekd.runtime.embedding_routes import EmbeddingsRequest
from edgekd.runtime.native_requests import DetokenizeRequest, NativeRequest, TokenizeRequest
from edgekd.runtime.openai_requests import ChatRequest, CompletionRequest

_HELLO = [{"role": "user", "content": "The quick"}]
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
_FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}}
ROUTES: list[tuple[str, Any, dict[str, Any]]] = [
    ("/v1/chat/completions", ChatRequest, {"messages": _HELLO, "max_tokens": 4}),
    ("/v1/completions", CompletionRequest, {"prompt": "The", "max_tokens": 4}),
    ("/completion", NativeRequest, {"prompt": "The", "n_predict": 4}),
    ("/tokenize", TokenizeRequest, {"content": "The quick"}),
    ("/detokenize", DetokenizeRequest, {"tokens": [5, 6]}),
    ("/v1/embeddings", EmbeddingsRequest, {"input": "The", "model": "tiny"}),
    ("/apply-template", ChatRequest, {"messages": _HELLO}),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 5, 63, 64, 65, 2**31, 2**63, -(2**63), 10**400, 1e308),
    *(0.0, 0.5, 1.0, -0.5, float("nan"), float("inf"), "", "a", "The", "\u0000", "\ud800", "🎉"),
    *("x" * 5000, [], {}, [""], ["a", "b"], [0], [1, 2], [-1], [2**40], [[1], [2]], ["a", 1]),
    *([None], [{}], {"a": 1}, _HELLO, [_TOOL], "auto", "none", "required", _FORM),
    *({"type": "json_object"}, {"type": "text"}, {"1": 5}, {"1": -100}, {"x": 1}, {"5": 1e9}),
    *({"type": "string", "pattern": "a+"}, {"type": "array", "minItems": 9}, {"$ref": "#"}),
    *('root ::= "a"', "root ::= root", "root ::= [a-z]+", "root ::= ", "(" * 2000),
    *({"include_usage": True}, "tiny", "../tiny", [{"role": "tool", "content": "x"}]),
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "system", "content": "a"}, *_HELLO, {"role": "assistant", "content": "b"}],
    [{"role": "user", "content": "a", "name": "\n"}],
    [[5, False], ["a", 2]],
]


def request_of(data: bytes) -> tuple[str, bytes]:
    """Return the route and the body that ``data`` stands for.

    The first byte names the route; the second is 0 for a raw body, else pairs of bytes follow,
    a field and a value each.
    """
    route, model, base = ROUTES[(data[0] if data else 0) % len(ROUTES)]
    if len(data) > 1 and data[1] == 0:
        return route, data[2:]
    names = field_names(model)
    body = dict(base)
    for place in range(2, min(len(data) - 1, 40), 2):
        body[names[data[place] % len(names)]] = VALUES[data[place + 1] % len(VALUES)]
    return route, json.dumps(body).encode()


def field_names(model: Any) -> list[str]:
    """Return the fields that ``model`` knows, in a lasting order, and one that it does not."""
    idle = sorted(model.ignored | set(model.without_effect))
    return [*(field.alias or name for name, field in model.model_fields.items()), *idle, "unknown"]
