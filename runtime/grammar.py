"""Text that must have a form: JSON, a JSON schema, a regular expression, Lark or GBNF.

llguidance turns each into the tokens that may come next, for any engine. It is native code, so
``grammar_limits`` looks at the text first, and llguidance gets limits of its own as well.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from edgekd.errors import EngineError, MissingExtraError, RecipeError
from edgekd.runtime.grammar_limits import check_regex, check_rules, check_schema
from edgekd.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# V vocabulary

GrammarKind = Literal["json_object", "json_schema", "regex", "lark", "gbnf"]
_ANY_OBJECT = '{"type":"object"}'
_SPECIAL = b"\xff"  # llguidance's mark of a token that stands for no text
# Lark blocks that hold another language, which the limits would not see.
_FOREIGN_BLOCKS = ("%json", "%regex")
# Small models fill whole contexts with white space where any amount is allowed.
_JSON_STYLE = {"whitespace_pattern": r" |\n[ \t]{0,20}"}
_LIMITS = {
    "initial_lexer_fuel": 500_000,  # about 10 ms
    "step_lexer_fuel": 100_000,  # about 7 ms a token
    "max_lexer_states": 50_000,  # about 100 MB
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


@dataclass(frozen=True)
class Grammar:
    """The form that a text must have."""

    kind: GrammarKind
    text: str = ""


class Matcher(Protocol):
    """Follows one text and knows what may come next."""

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole and nothing can follow."""

    def allowed(self) -> "NDArray[np.bool_]":
        """Return which tokens may come next [V]."""

    def accept(self, token_id: int) -> None:
        """Append a token."""


def check_grammar(grammar: Grammar) -> None:
    """Return only if ``grammar`` is small enough for a native parser; needs no library.

    Raises:
        RecipeError: it is not, or its kind is unknown.
    """
    checks: dict[str, Any] = {
        "json_object": lambda text: None,
        "json_schema": check_schema,
        "regex": check_regex,
        "lark": _check_lark,
        "gbnf": check_rules,
    }
    if grammar.kind not in checks:
        raise RecipeError(f"grammar {grammar.kind!r} is unknown; known are {', '.join(checks)}")
    checks[grammar.kind](grammar.text)


class GrammarCompiler:
    """Compiles grammars for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Read the vocabulary of ``tokenizer``; the logits have ``vocab_size`` columns.

        Raises:
            MissingExtraError: llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError as error:
            raise MissingExtraError("llguidance", "serve") from error
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
        stop_ids = sorted(tokenizer.stop_ids)
        self._tokenizer = llguidance.LLTokenizer(wrapper, eos_token=stop_ids)
        self._vocab_size = vocab_size

    def compile(self, grammar: Grammar) -> Matcher:
        """Return a matcher at the beginning of a text.

        Raises:
            RecipeError: the grammar is too large, or malformed.
        """
        import llguidance

        check_grammar(grammar)
        limits = llguidance.LLParserLimits(**_LIMITS)
        native = llguidance.LLMatcher(
            self._tokenizer, _to_llguidance(grammar), log_level=0, limits=limits
        )
        native.compute_bitmask()  # some faults, such as a rule of itself alone, show only here
        if native.is_error():
            raise RecipeError(f"the {grammar.kind} is not accepted: {_first_line(native)}")
        matcher = LlguidanceMatcher(native, self._vocab_size)
        try:
            matcher.allowed()  # some grammars, such as root ::= root, turn out here to be empty
        except EngineError as error:
            raise RecipeError(f"the {grammar.kind} is not accepted: {error}") from error
        return matcher


class LlguidanceMatcher:
    """llguidance's matcher behind our protocol."""

    def __init__(self, native: Any, vocab_size: int) -> None:
        """Follow a text with ``native``."""
        self._native = native
        self._vocab_size = vocab_size

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole and nothing can follow."""
        return bool(self._native.is_stopped()) and not self._native.is_error()

    def allowed(self) -> "NDArray[np.bool_]":
        """Return which tokens may come next [V].

        Raises:
            EngineError: the grammar needs more work for one token than is allowed.
        """
        import numpy as np

        packed = np.frombuffer(self._native.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(packed, count=self._vocab_size, bitorder="little").astype(np.bool_)

    def accept(self, token_id: int) -> None:
        """Append a token.

        Raises:
            EngineError: the grammar does not allow it.
        """
        self._native.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._native.is_error():
            raise EngineError(f"the grammar cannot go on: {_first_line(self._native)}")


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokens = [
            tokenizer.token_bytes(token_id) or _SPECIAL + b"<%d>" % token_id
            for token_id in range(vocab_size)
        ]
        self.special_token_ids = [
            token_id for token_id, piece in enumerate(self.tokens) if piece[:1] == _SPECIAL
        ]
        self.bos_token_id = None
        self.eos_token_id = min(tokenizer.stop_ids, default=vocab_size - 1)
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return self._tokenizer.encode(decoded)


def _check_lark(text: str) -> None:
    check_rules(text)
    if found := next((block for block in _FOREIGN_BLOCKS if block in text), None):
        raise RecipeError(f"{found} blocks are not allowed in a Lark grammar; write rules instead")


def _to_llguidance(grammar: Grammar) -> str:
    """Return ``grammar`` in llguidance's own notation."""
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return str(LLMatcher.grammar_from_regex(grammar.text))
    if grammar.kind == "lark":
        return str(LLMatcher.grammar_from_lark(grammar.text))
    if grammar.kind == "gbnf":
        return str(LLMatcher.grammar_from_lark(_gbnf_to_lark(grammar.text)))
    schema = _ANY_OBJECT if grammar.kind == "json_object" else grammar.text
    return str(LLMatcher.grammar_from_json_schema(schema, defaults=_JSON_STYLE))


def _gbnf_to_lark(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(gbnf_to_lark(text))
    except Exception as error:  # the converter raises bare Exception, IndexError and others
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"the grammar is no GBNF that can be converted: {reason}") from error


def _first_line(native: Any) -> str:
    lines = str(native.get_error()).strip().splitlines()
    return lines[0][:300] if lines else "no reason given"
