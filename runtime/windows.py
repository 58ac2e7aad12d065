"""A text cut into the windows of token ids on which models are compared."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgekd.errors import DataError, RecipeError
from edgekd.runtime.engine import Engine
from edgekd.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgekd.runtime.engine import Logits

DEFAULT_WINDOW_TOKENS = 256
_CHUNK_TOKENS = 128  # logits of so many positions are in memory at a time

Windows = Sequence[Sequence[int]]


def cut_windows(
    tokenizer: Tokenizer, text: str, n_tokens: int, window_tokens: int
) -> list[list[int]]:
    """Return the first ``n_tokens`` of ``text`` in windows of at most ``window_tokens``.

    Each begins with the tokens that a text of this model begins with (BOS), which count on top
    of ``n_tokens``. A rest of one token, which predicts nothing, is left out.

    Raises:
        DataError: the text has fewer than two tokens.
        RecipeError: a window has no room for two tokens.
    """
    begin = begin_ids(tokenizer)
    room = window_tokens - len(begin)
    if room < 2:
        raise RecipeError(f"windows of {window_tokens} tokens are too short; give 16 or more")
    ids = tokenizer.encode(text, add_special=False)[:n_tokens]
    windows = [begin + ids[i : i + room] for i in range(0, len(ids), room)]
    windows = [window for window in windows if len(window) >= 2]
    if not windows:
        raise DataError(f"the text has {len(ids)} tokens, at least 2 are needed")
    return windows


def begin_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that ``tokenizer`` puts in front of every text: BOS, or nothing."""
    plain = tokenizer.encode("a", add_special=False)
    marked = tokenizer.encode("a")
    for i in range(len(marked) - len(plain) + 1):
        if marked[i : i + len(plain)] == plain:
            return marked[:i]
    return []


def n_scored(windows: Windows) -> int:
    """Return at how many positions of ``windows`` a next token is known."""
    return sum(len(window) - 1 for window in windows)


def windows_sha256(windows: Windows) -> str:
    """Return a hash of all ids, as a JSON list of lists."""
    return hashlib.sha256(json.dumps([list(window) for window in windows]).encode()).hexdigest()


def each_prediction(
    engine: Engine, windows: Windows
) -> Iterator[tuple[int, Sequence[int], "Logits"]]:
    """Yield window number, next ids [S] and the logits that predict them [S, V], in order."""
    for number, window in enumerate(windows):
        engine.rewind()
        for start in range(0, len(window) - 1, _CHUNK_TOKENS):
            ids = window[start : start + _CHUNK_TOKENS + 1]
            yield number, ids[1:], engine.forward(ids[:-1], every_logit=True)
