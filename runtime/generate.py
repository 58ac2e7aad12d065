"""Prompt ids to text, token by token: the one loop behind chat, server and command line.

Text leaves only when it is certain: a character with its last byte, and what could be the
beginning of a stop string once it turns out not to be one.
"""

import codecs
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

from edgekd.errors import RecipeError
from edgekd.runtime.engine import check_fits
from edgekd.runtime.loading import LoadedModel
from edgekd.runtime.sampling import Sampler, SamplingParams
from edgekd.runtime.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """One token of a reply and the text that became certain with it, often none."""

    text: str
    token_id: int
    finish_reason: FinishReason | None
    """Set on the last piece only."""


class StopFilter:
    """Lets text through up to the stop string that is complete first, however it is cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Look out for ``stops``."""
        self.is_stopped = False
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> str:
        """Return what is certain to come before a stop string, now that ``text`` is known."""
        if self.is_stopped:
            return ""
        self._held += text
        found = [(self._held.find(stop), len(stop)) for stop in self._stops]
        matches = [(start + length, start) for start, length in found if start >= 0]
        if matches:
            self.is_stopped = True
            return self._release(min(matches)[1])
        return self._release(len(self._held) - self._undecided())

    def flush(self) -> str:
        """Return what was held back; call it when no more text will come."""
        return "" if self.is_stopped else self._release(len(self._held))

    def _release(self, n_chars: int) -> str:
        released, self._held = self._held[:n_chars], self._held[n_chars:]
        return released

    def _undecided(self) -> int:
        """Return the length of the longest end of the held text that may begin a stop string."""
        longest = max(map(len, self._stops), default=0) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class _TextOut:
    """Token ids in, certain text out."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._filter = StopFilter(stops)

    @property
    def is_stopped(self) -> bool:
        return self._filter.is_stopped

    def add(self, token_id: int) -> str:
        return self._filter.feed(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def end(self) -> str:
        return self._filter.feed(self._decoder.decode(b"", final=True)) + self._filter.flush()


def generate(
    loaded: LoadedModel, prompt_ids: Sequence[int], params: SamplingParams
) -> Generator[Piece, None, None]:
    """Yield the reply to ``prompt_ids``, one piece a token; closing it computes nothing more.

    Raises:
        RecipeError: the prompt is empty.
        EngineError: the prompt does not fit into the context, or the engine fails.
    """
    if not prompt_ids:
        raise RecipeError("the prompt has no tokens, at least one is needed; give some text")
    engine = loaded.engine
    sampler, out = Sampler(params), _TextOut(loaded.tokenizer, params.stop)
    engine.rewind()
    check_fits(engine, len(prompt_ids))
    logits_V = engine.forward(prompt_ids)
    for n_tokens in count(1):
        token_id = sampler.pick(logits_V)
        is_last = n_tokens == params.max_tokens or engine.position == engine.context_tokens
        piece = _piece(out, token_id, token_id in loaded.tokenizer.stop_ids, is_last)
        yield piece
        if piece.finish_reason:
            return
        logits_V = engine.forward([token_id])


def _piece(out: _TextOut, token_id: int, is_stop_token: bool, is_last: bool) -> Piece:
    text = "" if is_stop_token else out.add(token_id)
    if out.is_stopped:
        return Piece(text, token_id, "stop")
    if not (is_stop_token or is_last):
        return Piece(text, token_id, None)
    text += out.end()
    return Piece(text, token_id, "stop" if is_stop_token or out.is_stopped else "length")
