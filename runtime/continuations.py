"""How likely a model finds continuations of a text, scored as lm-evaluation-harness does.

The context runs once for all of its continuations, and what a context has in common with the one
before (the examples of a few-shot prompt) stays in the KV cache.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgekd.errors import DataError, EngineError, ModelError
from edgekd.runtime.engine import Engine
from edgekd.runtime.fidelity import log_softmax
from edgekd.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgekd.runtime.engine import Logits

# T tokens, V vocabulary


@dataclass(frozen=True)
class Scored:
    """What a model makes of one continuation."""

    log_p: float
    """Sum over its tokens, in nats."""
    n_tokens: int
    is_greedy: bool
    """Whether the model itself would have written it."""


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Return the ids of ``context`` and those of ``continuation`` after it.

    Blanks at the end of the context go to the continuation, since tokens carry the blank in front
    of a word. Both are encoded together, and cut where the context alone would end. An empty
    context is the token that texts begin after (BOS, or EOS where there is none).

    Raises:
        DataError: the continuation has no token of its own.
        ModelError: the context is empty, and the model knows no token to begin after.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    if bare:
        before = tokenizer.encode(bare)
        after = tokenizer.encode(bare + continuation)[len(before) :]
    else:
        before, after = _from_nothing(tokenizer, continuation)
    if not after:
        raise DataError(f"the continuation {continuation[:40]!r} has no token of its own")
    return before, after


def _from_nothing(tokenizer: Tokenizer, continuation: str) -> tuple[list[int], list[int]]:
    first, ids = tokenizer.first_id, tokenizer.encode(continuation, add_special=False)
    if first is None:
        raise ModelError("the tokenizer names neither BOS nor EOS, so a context cannot be empty")
    return [first], ids[1:] if ids[:1] == [first] else ids


class Scorer:
    """Scores continuations on one engine."""

    def __init__(self, engine: Engine) -> None:
        """Score on ``engine``, which nobody else may use meanwhile."""
        self._engine = engine
        self._context: list[int] = []
        self._after_V: Logits | None = None  # of that context

    def score(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """Return the score of each of ``continuations`` after ``context``.

        What does not fit into the engine's context is cut off on the left, continuation by
        continuation; the last token needs no room, as it predicts nothing.

        Raises:
            EngineError: the engine fails.
        """
        room = self._engine.context_tokens
        cuts = [max(0, len(context) + len(ids) - 1 - room) for ids in continuations]
        found = []
        for ids, cut in zip(continuations, cuts, strict=True):
            if cut >= len(context):  # all that is left to begin after is its own first tokens
                raise EngineError(
                    f"a continuation of {len(ids)} tokens leaves no room for a context in "
                    f"{room} tokens; raise --ctx"
                )
            found.append(self._score(list(context[cut:]), list(ids)))
        return found

    def _score(self, context: list[int], ids: list[int]) -> Scored:
        before_V = self._run_context(context)
        rows = [before_V[None]]
        if len(ids) > 1:
            rows.append(self._engine.forward(ids[:-1], every_logit=True))
        log_p_TV = log_softmax(np.concatenate(rows))
        picked_T = log_p_TV[np.arange(len(ids)), ids]
        is_greedy = bool((log_p_TV.argmax(-1) == np.asarray(ids)).all())
        return Scored(float(picked_T.sum()), len(ids), is_greedy)

    def _run_context(self, context: list[int]) -> "Logits":
        """Return the logits behind ``context``, of which as much as can be is in the cache."""
        if context == self._context:
            self._rewind(len(context))
            if self._after_V is not None and self._engine.position == len(context):
                return self._after_V
        n_kept = len(os.path.commonprefix([context, self._context]))
        self._rewind(min(n_kept, len(context) - 1))
        start = self._engine.position
        self._context = []  # of a failed run nothing is known
        after_V = self._engine.forward(context[start:])
        self._context, self._after_V = context, after_V
        return after_V

    def _rewind(self, position: int) -> None:
        """Go back to ``position``, or to the start where a cache does not allow it."""
        try:
            self._engine.rewind(position)
        except EngineError:  # a sliding window has forgotten what lies before it
            self._engine.rewind()
