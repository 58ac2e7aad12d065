import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekd.errors import EngineError, RecipeError
from edgekd.runtime.grammar import Grammar, GrammarCompiler, GrammarKind, Matcher, check_grammar
from edgekd.runtime.grammar_limits import MAX_BYTES, check_regex, check_rules, check_schema
from edgekd.runtime.loading import LoadedModel, open_model
from edgekd.runtime.sampling import Sampler, SamplingParams
from edgekd.runtime.stops import TextOut

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GBNF = r"""
root ::= greeting ", " who-is "!"   # a comment
greeting ::= "hi" | "hel" "lo"{1,2}
who-is ::= [a-c]+ | "\"you\""
"""
LARK = 'start: "yes" | "no" TAIL\nTAIL: /x{2,3}/'


@pytest.fixture(scope="module", params=["tiny_gguf", "tiny_onnx"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return open_model(request.getfixturevalue(request.param), context_tokens=64, n_threads=1)


@pytest.fixture(scope="module")
def compiler(loaded: LoadedModel) -> GrammarCompiler:
    return GrammarCompiler(loaded.tokenizer, loaded.engine.vocab_size)


def random_text(loaded: LoadedModel, matcher: Matcher, seed: int) -> str:
    """What noise becomes under a grammar: logits without sense, masked."""
    rng = np.random.default_rng(seed)
    closing = [token_id for mark in '"}' for token_id in loaded.tokenizer.encode(mark)]
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
    out, text = TextOut(loaded.tokenizer, []), ""
    for _ in range(400):
        logits_V = rng.normal(size=loaded.engine.vocab_size).astype(np.float32)
        logits_V[[2, *closing]] += 4  # an end is likely where it is allowed
        token_id = sampler.pick(logits_V, matcher.allowed())
        if token_id in loaded.tokenizer.stop_ids:
            break
        matcher.accept(token_id)
        text += out.add(token_id)
        if matcher.is_complete:
            break
    else:
        pytest.fail(f"no end: {text!r}")
    return text + out.end()


@pytest.mark.parametrize("seed", range(4))
def test_noise_becomes_json_of_the_schema(
    loaded: LoadedModel, compiler: GrammarCompiler, seed: int
) -> None:
    matcher = compiler.compile(Grammar("json_schema", json.dumps(SCHEMA)))
    found = json.loads(random_text(loaded, matcher, seed))
    assert set(found) == {"name", "age"}
    assert found["name"] in ("ann", "bob") and found["age"] >= 0


@pytest.mark.parametrize(
    ("kind", "text", "form"),
    [
        ("regex", r"[a-f]{3}-\d{2,4}", r"[a-f]{3}-\d{2,4}"),
        ("lark", LARK, r"yes|nox{2,3}"),
        ("gbnf", GBNF, r'(hi|hel(lo){1,2}), ([a-c]+|"you")!'),
    ],
)
def test_noise_takes_the_form_that_is_asked_for(
    loaded: LoadedModel, compiler: GrammarCompiler, kind: GrammarKind, text: str, form: str
) -> None:
    for seed in range(4):
        assert re.fullmatch(form, random_text(loaded, compiler.compile(Grammar(kind, text)), seed))


def test_any_json_object_is_an_object(loaded: LoadedModel, compiler: GrammarCompiler) -> None:
    found = json.loads(random_text(loaded, compiler.compile(Grammar("json_object")), 1))
    assert isinstance(found, dict)


def test_an_end_is_allowed_only_where_the_text_is_whole(
    loaded: LoadedModel, compiler: GrammarCompiler
) -> None:
    matcher = compiler.compile(Grammar("regex", "ab"))
    assert not matcher.allowed()[sorted(loaded.tokenizer.stop_ids)].any()
    for token_id in loaded.tokenizer.encode("ab"):
        matcher.accept(token_id)
    assert matcher.is_complete


def test_a_token_that_does_not_fit_is_an_error(
    loaded: LoadedModel, compiler: GrammarCompiler
) -> None:
    matcher = compiler.compile(Grammar("regex", "ab"))
    with pytest.raises(EngineError, match="cannot go on"):
        matcher.accept(loaded.tokenizer.encode("z")[0])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(("),
        ("lark", "start: nowhere"),
        ("gbnf", "root ::= nowhere"),
        ("gbnf", "root ::= root"),
        ("gbnf", 'root ::= "a\\'),
        ("gbnf", 'other ::= "a"'),
        ("json_schema", '{"type": "nothing"}'),
    ],
)
def test_malformed_grammars_are_refused_in_words(
    compiler: GrammarCompiler, kind: GrammarKind, text: str
) -> None:
    with pytest.raises(RecipeError, match="not accepted|no GBNF"):
        compiler.compile(Grammar(kind, text))


DEEP = 65
BOMBS: list[tuple[str, str, str]] = [
    ("gbnf", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "bytes"),
    ("gbnf", "root ::= " + "(" * DEEP + '"a"' + ")" * DEEP, "deeper"),
    ("lark", "start: " + "(" * DEEP + '"a"' + ")" * DEEP, "deeper"),
    ("lark", "\n".join(f"a{i}: a{i + 1}" for i in range(2_001)), "2001 rules"),
    ("lark", 'start: "a"{10001}', "10001 times"),
    ("lark", 'start: "a" ~ 1..99999', "99999 times"),
    ("lark", "start: %json {}", "%json"),
    ("regex", "(" * DEEP + "a" + ")" * DEEP, "deeper"),
    ("regex", "a{100000}", "100000 times"),
    ("regex", "a{" + "9" * 5000 + "}", "times"),
    ("regex", "((a{100}){100}b{9,}){200}", "written out"),
    ("json_schema", '{"type":"string","maxLength":100000}', "100000 times"),
    ("json_schema", '{"minItems":1e400}', "times"),
    ("json_schema", '{"a":' * DEEP + "1" + "}" * DEEP, "deeper"),
    ("json_schema", "[" * 30_000, "deeper"),
    ("json_schema", '{"items":{"items":{"maxItems":2000},"maxItems":1000}}', "multiply"),
    ("json_schema", '{"pattern":"(x{999}){9999}"}', "written out"),
    ("json_schema", '{"patternProperties":{"x{99999}":{}}}', "99999 times"),
    ("json_schema", '{"$ref":"http://example.org/a"}', "leaves"),
    ("json_schema", '{"x-guidance":{}}', "x-guidance"),
    ("json_schema", '{"maxLength":NaN}', "NaN"),
    ("json_schema", "[]", "list"),
    ("json_schema", "\ud800", "surrogate"),
    ("regex", "a\0", "NUL"),
    ("yaml", "a", "unknown"),
]


@pytest.mark.parametrize(("kind", "text", "words"), BOMBS)
def test_what_could_hurt_a_native_parser_is_refused_before(
    kind: GrammarKind, text: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        check_grammar(Grammar(kind, text))


def test_what_is_within_the_limits_passes() -> None:
    check_regex(r"[({[]{3}\(\(\((a|b){0,100}c{2,}" + "[(]" * 100)
    check_rules(GBNF + "x ::= " + '"(((("' * 40)
    names = {"maxLength": {"type": "integer"}, "$ref": {"const": {"maxLength": 10**9}}}
    check_schema(json.dumps({"properties": names, "maxItems": 10_000}))
    check_schema("true")


@settings(max_examples=300, deadline=None)
@given(st.text('()[]{}"\\,0123456789a|*+?: \n~.%', max_size=60))
def test_no_text_breaks_the_checks_or_the_compiler(compiler: GrammarCompiler, text: str) -> None:
    kinds: tuple[GrammarKind, ...] = ("regex", "lark", "gbnf", "json_schema")
    for kind in kinds:
        try:
            compiler.compile(Grammar(kind, text)).allowed()
        except (RecipeError, EngineError) as error:
            assert str(error)


def test_the_limit_of_bytes_counts_bytes() -> None:
    with pytest.raises(RecipeError, match=str(MAX_BYTES)):
        check_regex("é" * (MAX_BYTES // 2 + 1))


def test_llguidance_is_named_where_it_is_missing(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(Exception, match=r"edgekd\[serve\]"):
        GrammarCompiler(loaded.tokenizer, loaded.engine.vocab_size)


def test_a_model_folder_is_enough_for_grammars(tiny_folder: Path) -> None:
    model = open_model(tiny_folder, context_tokens=32, n_threads=1)
    matcher = GrammarCompiler(model.tokenizer, model.engine.vocab_size).compile(
        Grammar("regex", "[xy]{4}")
    )
    assert re.fullmatch("[xy]{4}", random_text(model, matcher, 0))
