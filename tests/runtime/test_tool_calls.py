"""Calls in a model's text, however it is cut into pieces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.runtime.api_errors import ApiError
from edgekd.runtime.openai_requests import Tool
from edgekd.runtime.tool_calls import Call, CallReader, call_grammar

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "</b> é"}}\n</tool_call>'


def read(pieces: list[str], *, in_call: bool = False) -> tuple[str, list[tuple[str, str]]]:
    reader = CallReader(in_call=in_call)
    found = [each for piece in pieces for each in reader.feed(piece)] + list(reader.end())
    text = "".join(each for each in found if isinstance(each, str))
    return text, [(call.name, call.arguments) for call in found if isinstance(call, Call)]


@given(
    st.lists(st.sampled_from([CALL, "text ", "<tool", "</tool_call>", "<tool_call>no", "é"])),
    st.integers(1, 9),
)
def test_pieces_do_not_change_what_is_read(parts: list[str], size: int) -> None:
    whole = "".join(parts)
    cut = [whole[start : start + size] for start in range(0, len(whole), size)]
    assert read(cut) == read([whole])


def test_text_around_calls_stays_and_the_space_between_goes() -> None:
    text, calls = read([f"Let me see.{CALL}\n{CALL}"])
    assert text == "Let me see."
    assert calls == [("f", json.dumps({"a": "</b> é"}))] * 2


@pytest.mark.parametrize(
    "text", ["<tool_call>no json</tool_call>", "<tool_call>[1]</tool_call>", "a < b", "<tool_ca"]
)
def test_what_is_no_call_is_text(text: str) -> None:
    assert read(list(text)) == (text, [])


def test_a_call_without_its_end_counts_and_half_a_call_is_text() -> None:
    assert read(['{"name": "f", "arguments": {}}'], in_call=True) == ("", [("f", "{}")])
    assert read(["<tool_call>{"]) == ("<tool_call>{", [])


def test_definitions_move_to_the_root_and_must_agree() -> None:
    def tool(name: str, value: object) -> Tool:
        schema = {"properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"const": value}}}
        return Tool.model_validate(
            {"type": "function", "function": {"name": name, "parameters": schema}}
        )

    schema = json.loads(call_grammar([tool("f", 1), tool("g", 1)]).text)
    assert schema["$defs"] == {"X": {"const": 1}} and len(schema["anyOf"]) == 2
    with pytest.raises(ApiError, match="rename"):
        call_grammar([tool("f", 1), tool("g", 2)])
