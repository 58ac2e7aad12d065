"""Functions that a model calls: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

This form, of Hermes, is what Qwen, SmolLM and many others are trained on. Where a call is
required, the reply is made to begin with the mark and to go on as JSON that fits the schema.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd.runtime.api_errors import ApiError
from edgekd.runtime.grammar import Grammar

if TYPE_CHECKING:
    from edgekd.runtime.openai_requests import Tool

Json = dict[str, Any]

BEGIN, END = "<tool_call>", "</tool_call>"
OPENING = BEGIN + "\n"
"""What a reply that must be a call begins with."""
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True)
class Call:
    """A function call in a reply."""

    name: str
    arguments: str
    """As JSON text."""
    id: str

    def as_json(self) -> Json:
        """Return the call in OpenAI's form."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class CallReader:
    """Text in; text that is no call, and calls, out. A mark may be cut anywhere."""

    def __init__(self, *, in_call: bool = False) -> None:
        """Begin a reply, or the inside of a call whose mark is not part of the text."""
        self._held = BEGIN if in_call else ""
        self.n_calls = 0
        self._space = ""

    def feed(self, text: str) -> Iterator[str | Call]:
        """Yield what is certain now that ``text`` is known."""
        self._held += text
        while self._held:
            before, mark, rest = self._held.partition(BEGIN)
            if not mark:
                n_certain = len(self._held) - _possible_mark(self._held)
                yield from self._say(self._held[:n_certain])
                self._held = self._held[n_certain:]
                return
            inside, end, after = rest.partition(END)
            yield from self._say(before)
            self._held = mark + rest
            if not end:
                return
            yield self._read(inside) or mark + inside + end
            self._held = after

    def end(self) -> Iterator[str | Call]:
        """Yield the rest: many texts end at the last brace, without the closing mark."""
        held, self._held = self._held, ""
        if held.startswith(BEGIN) and (call := self._read(held.removeprefix(BEGIN))):
            yield call
        else:
            yield from self._say(held)

    def _say(self, text: str) -> Iterator[str]:
        """Yield ``text``, but not the white space that stands between calls and at the end."""
        if not self.n_calls:
            if text:
                yield text
            return
        text = self._space + text
        certain = text.rstrip()
        self._space = text[len(certain) :]
        if certain:
            yield certain

    def _read(self, text: str) -> Call | None:
        """Return the call that ``text`` holds; None if it is none."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return None
        arguments = found.get("arguments", found.get("parameters", {}))
        as_text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        self.n_calls += 1
        self._space = ""
        return Call(found["name"], as_text, f"call_{uuid.uuid4().hex[:24]}")


def call_grammar(tools: Sequence["Tool"]) -> Grammar:
    """Return the form of a call of one of ``tools``.

    Raises:
        ApiError: two of them define different things under one name.
    """
    shared: dict[str, Json] = {key: {} for key in _DEFINITIONS}
    choices = []
    for tool in tools:
        parameters = dict(tool.function.parameters) or {"type": "object"}
        for key in _DEFINITIONS:
            _merge(shared[key], parameters.pop(key, {}), tool.function.name)
        choices.append(_call_schema(tool.function.name, parameters))
    schema: Json = choices[0] if len(choices) == 1 else {"anyOf": choices}
    return Grammar("json_schema", json.dumps(schema | {k: v for k, v in shared.items() if v}))


def _call_schema(name: str, parameters: Json) -> Json:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _merge(target: Json, found: Any, name: str) -> None:
    """Move a tool's definitions to the root of the schema, where references look for them."""
    if not isinstance(found, dict) or any(
        target.get(key, found[key]) != found[key] for key in found
    ):
        raise ApiError(
            400,
            f"tool {name!r} defines what an earlier one defines differently; rename its $defs",
            code="invalid_value",
            param="tools",
        )
    target.update(found)


def _possible_mark(text: str) -> int:
    """Return the length of the longest end of ``text`` that may begin a mark."""
    longest = min(len(BEGIN) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if BEGIN.startswith(text[-n:])), 0)
