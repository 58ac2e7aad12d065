"""Prompt ids to text, token by token: the one loop behind chat, server and command line.

Text leaves only when it is certain: a character with its last byte, and what could be the
beginning of a stop string once it turns out not to be one.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

from edgekd.errors import RecipeError
from edgekd.runtime.engine import check_fits
from edgekd.runtime.loading import LoadedModel
from edgekd.runtime.sampling import Sampler, SamplingParams
from edgekd.runtime.stops import TextOut

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """One token of a reply and the text that became certain with it, often none."""

    text: str
    token_id: int
    finish_reason: FinishReason | None
    """Set on the last piece only."""


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
    stop_ids = loaded.tokenizer.stop_ids
    sampler, out = Sampler(params, prompt_ids, stop_ids), TextOut(loaded.tokenizer, params.stop)
    engine.rewind()
    check_fits(engine, len(prompt_ids))
    logits_V = engine.forward(prompt_ids)
    for n_tokens in count(1):
        token_id = sampler.pick(logits_V)
        is_last = n_tokens == params.max_tokens or engine.position == engine.context_tokens
        piece = _piece(out, token_id, token_id in stop_ids, is_last)
        yield piece
        if piece.finish_reason:
            return
        logits_V = engine.forward([token_id])


def _piece(out: TextOut, token_id: int, is_stop_token: bool, is_last: bool) -> Piece:
    text = "" if is_stop_token else out.add(token_id)
    if out.is_stopped:
        return Piece(text, token_id, "stop")
    if not (is_stop_token or is_last):
        return Piece(text, token_id, None)
    text += out.end()
    return Piece(text, token_id, "stop" if is_stop_token or out.is_stopped else "length")
