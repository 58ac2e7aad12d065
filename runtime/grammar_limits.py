"""What a grammar or a JSON schema must pass before a native parser sees it, in pure Python.

Native parsers recurse: llama.cpp's overflows the stack at 20,000 nested parentheses, llguidance's
at a chain of 20,000 rules. So size, depth, number of rules and repetitions are bounded first.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from edgekd.errors import RecipeError

MAX_BYTES = 32 * 1024
MAX_DEPTH = 64
MAX_RULES = 2_000
MAX_REPEAT = 10_000
"""Highest bound of one repetition: {m,n}, maxLength, maxItems ..."""
MAX_EXPANDED = 1_000_000
"""Symbols of a grammar whose repetitions are all written out."""

_ENDLESS_REPEAT = 1  # *, + and {m,} loop: no copies beyond the first m
_REPEAT = re.compile(r"\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}")
_TILDE_REPEAT = re.compile(r"~\s*(\d+)(?:\s*\.\.\s*(\d+))?")
_RULE = re.compile(r"^\s*[\w.-]+\s*(?:::=|:)", re.MULTILINE)
_COUNTS = {"maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties"}
_DATA = {"const", "default", "enum", "examples"}  # values, not schemas


def check_text(text: str) -> None:
    """Return only if ``text`` is short enough for any parser.

    Raises:
        RecipeError: it is not, or it is no text.
    """
    try:
        n_bytes = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise RecipeError("the grammar holds half a surrogate pair; send plain text") from None
    if n_bytes > MAX_BYTES:
        raise RecipeError(f"the grammar has {n_bytes} bytes, {MAX_BYTES} are allowed; shorten it")
    if "\0" in text:
        raise RecipeError("the grammar holds a NUL character; leave it out")


def check_rules(text: str) -> None:
    """Return only if the GBNF or Lark grammar ``text`` is within the limits.

    Raises:
        RecipeError: it is not.
    """
    check_text(text)
    n_rules = len(_RULE.findall(text))
    if n_rules > MAX_RULES:
        raise RecipeError(f"the grammar has {n_rules} rules, {MAX_RULES} are allowed")
    for match in _TILDE_REPEAT.finditer(text):
        _check_repeat(max(_number(each) for each in match.groups() if each))
    _check_expanded(text, has_strings=True)


def check_regex(pattern: str) -> None:
    """Return only if the regular expression ``pattern`` is within the limits.

    Raises:
        RecipeError: it is not.
    """
    check_text(pattern)
    _check_expanded(pattern, has_strings=False)


def check_schema(text: str) -> Any:
    """Return the JSON schema ``text`` if it is within the limits.

    Raises:
        RecipeError: it is not, or it is not JSON.
    """
    check_text(text)
    _check_json_depth(text)
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"the JSON schema is not JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise RecipeError(
            f"the JSON schema is a {type(schema).__name__}, an object or a boolean is needed"
        )
    if _expanded_schema(schema) > MAX_EXPANDED:
        raise RecipeError(
            f"the JSON schema repeats more than {MAX_EXPANDED} values, since its counts multiply; "
            "lower maxItems"
        )
    return schema


def _check_json_depth(text: str) -> None:
    depth = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text, re.DOTALL):
        if token[0] in "[{":
            depth += 1
            _check_depth(depth)
        elif token[0] in "]}":
            depth -= 1


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise RecipeError(f"the grammar nests deeper than {MAX_DEPTH} levels; flatten it")


def _check_repeat(count: float) -> None:
    if count > MAX_REPEAT:
        shown = f"{count:.0f}" if count < 1e15 else "far more"
        raise RecipeError(f"the grammar repeats {shown} times, {MAX_REPEAT} are allowed; lower it")


def _number(digits: str) -> float:
    return float(digits[:20])  # exact enough to see that it is too large


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_expanded(text: str, *, has_strings: bool) -> None:
    """Bound depth, repetitions, and the size with all repetitions written out."""
    sizes = [0.0]  # of the groups that are open
    last = 0.0  # size of what a repetition would repeat
    for kind, token in _tokens(text, has_strings):
        if kind == "open":
            sizes.append(0)
            _check_depth(len(sizes) - 1)
            continue
        if kind == "close":
            last = sizes.pop() if len(sizes) > 1 else 0
        elif kind == "repeat":
            match = _REPEAT.fullmatch(token)
            assert match
            count = max(_number(each) for each in match.groups() if each)
            _check_repeat(count)
            last *= max(count - _ENDLESS_REPEAT, 0)
        else:
            last = 1
        sizes[-1] += last
        if sizes[-1] > MAX_EXPANDED:
            raise RecipeError(
                f"the grammar has more than {MAX_EXPANDED} symbols when its repetitions are "
                "written out; nest fewer of them"
            )


def _tokens(text: str, has_strings: bool) -> Iterator[tuple[str, str]]:
    """Yield brackets, repetitions and everything else; strings and classes are one symbol."""
    strings = r'"(?:[^"\\\n]|\\.)*"|' if has_strings else ""
    classes = r"\[\^?\]?(?:[^\]\\]|\\.)*\]"
    pattern = re.compile(
        rf"(?P<symbol>{strings}{classes}|\\.)|(?P<repeat>{_REPEAT.pattern})"
        r"|(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<other>[^\s])",
        re.DOTALL,
    )
    for match in pattern.finditer(text):
        assert match.lastgroup
        yield _kind(match), match[0]


def _kind(match: re.Match[str]) -> str:
    return next((name for name in ("repeat", "open", "close") if match[name] is not None), "symbol")


def _expanded_schema(node: Any) -> float:
    """Return how many values ``node`` can hold, its counts multiplied; check it on the way."""
    if isinstance(node, list):
        return sum(map(_expanded_schema, node))
    if not isinstance(node, dict):
        return 1
    _check_keywords(node)
    inside = sum(_expanded_schema(value) for name, value in node.items() if name not in _DATA)
    most: Any = node.get("maxItems", node.get("minItems"))
    return inside * max(float(most), 1.0) if _is_number(most) else inside


def _check_keywords(node: dict[str, Any]) -> None:
    for name, value in node.items():
        if name in _COUNTS and _is_number(value):
            _check_repeat(min(float(value), 1e16))
        if name == "pattern" and isinstance(value, str):
            check_regex(value)
        if name == "patternProperties" and isinstance(value, dict):
            for pattern in value:
                check_regex(pattern)
        if name == "$ref" and isinstance(value, str) and not value.startswith("#"):
            raise RecipeError(f"$ref {value[:80]!r} leaves the schema; only '#...' is followed")
        if name == "x-guidance":
            raise RecipeError("x-guidance is not allowed in a schema; leave it out")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
