"""The JSON of OpenAI's replies, whole and in parts."""

import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgekd.runtime.messages import Event, Finished, Scored, Token
from edgekd.runtime.openai_requests import OpenAIFields
from edgekd.runtime.sse import DONE, event
from edgekd.runtime.texts import Run, Vocabulary, new_id
from edgekd.runtime.timings import Timings
from edgekd.runtime.tool_calls import Call

Json = dict[str, Any]


def usage(ends: Sequence[Finished], n_prompt_tokens: int, *, none_made: bool = False) -> Json:
    """Return the count of tokens; several choices share one prompt."""
    n_made = 0 if none_made else sum(end.n_generated for end in ends)
    return {
        "prompt_tokens": n_prompt_tokens,
        "completion_tokens": n_made,
        "total_tokens": n_prompt_tokens + n_made,
        "prompt_tokens_details": {"cached_tokens": max((end.n_cached for end in ends), default=0)},
    }


def finish_reason(end: Finished, n_calls: int = 0) -> str:
    """Return why a text ended, in OpenAI's words."""
    if end.stop_kind == "limit":
        return "length"
    return "tool_calls" if n_calls else "stop"


@dataclass(frozen=True)
class Envelope:
    """What stands around every part of one reply; the same in all its parts."""

    alias: str
    is_chat: bool
    id: str = field(default_factory=new_id)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[Json], counts: Json, timings: Json) -> Json:
        """Return a reply in one piece."""
        around = self._around(choices, "chat.completion")
        return around | {"usage": counts, "timings": timings}

    def part(self, choices: list[Json]) -> Json:
        """Return a part of a stream."""
        return self._around(choices, "chat.completion.chunk")

    def _around(self, choices: list[Json], kind: str) -> Json:
        prefix = "chatcmpl-" if self.is_chat else "cmpl-"
        return {
            "id": prefix + self.id,
            "object": kind if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.alias,
            "choices": choices,
        }


async def stream(
    run: Run,
    asked: OpenAIFields,
    envelope: Envelope,
    timings: Sequence[Timings],
    deltas: Callable[[int, Event], Iterable[Json]],
    counts: Callable[[], Json],
) -> AsyncIterator[str]:
    """Yield the server-sent events of ``run``: what ``deltas`` makes of it, and its ``counts``."""
    is_counted = asked.stream_options.include_usage
    blank = {"usage": None} if is_counted else {}
    async for index, happened in run.events():
        timings[index].note(happened)
        beside = timings[index].beside(happened, each_token=asked.timings_per_token)
        choices = list(deltas(index, happened))
        for choice in choices:
            is_told = asked.timings_per_token or choice is choices[-1]
            yield event(envelope.part([choice]) | blank | (beside if is_told else {}))
    if is_counted:
        yield event(envelope.part([]) | {"usage": counts(), "timings": timings[0].as_json()})
    yield DONE


def chat_choice(index: int, text: str, calls: Sequence[Call], logprobs: Json | None) -> Json:
    """Return a choice of a whole chat reply, its end still missing."""
    message: Json = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message["tool_calls"] = [call.as_json() for call in calls]
        message["content"] = text or None
    return {"index": index, "message": message, "logprobs": logprobs}


def chat_delta(
    index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None
) -> Json:
    """Return a choice of a part of a chat reply."""
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def text_choice(
    index: int, text: str, logprobs: Json | None = None, reason: str | None = None
) -> Json:
    """Return a choice of a plain completion, whole or in part."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def with_rivals(
    scored: Iterable[Scored], vocabulary: Vocabulary, *, as_probs: bool = False
) -> list[Json]:
    """Return each token with its log-probability and the likeliest ones in its place.

    ``as_probs`` makes them probabilities, as llama-server's ``post_sampling_probs`` has them.
    """
    rivals = "top_probs" if as_probs else "top_logprobs"
    return [
        _entry(token_id, logprob, vocabulary, as_probs)
        | {rivals: [_entry(*each, vocabulary, as_probs) for each in alternatives]}
        for token_id, logprob, alternatives in scored
    ]


def chat_logprobs(tokens: Sequence[Token], vocabulary: Vocabulary) -> Json:
    """Return the log-probabilities of ``tokens`` as chats have them."""
    scored = (token.scored for token in tokens)
    return {"content": with_rivals(scored, vocabulary), "refusal": None}


def _entry(
    token_id: int, logprob: float | None, vocabulary: Vocabulary, as_probs: bool = False
) -> Json:
    """Return a token as OpenAI describes it, with llama-server's ``id``."""
    raw = vocabulary.bytes_of(token_id)
    text = raw.decode("utf-8", "replace")
    found: Json = {"id": token_id, "token": text, "bytes": list(raw)}
    if as_probs:
        return found | {"prob": None if logprob is None else math.exp(logprob)}
    return found | {"logprob": logprob}


@dataclass
class TextLogprobs:
    """The log-probabilities of plain completions, with each token's place in the text."""

    vocabulary: Vocabulary
    as_ids: bool
    """Name tokens by their ids, as vLLM's ``return_tokens_as_token_ids`` does."""
    offset: int = 0

    def of(self, scored: Sequence[Scored], n_best: int) -> Json:
        """Return the tokens that come next in the text."""
        offsets = []
        for token_id, _, _ in scored:
            offsets.append(self.offset)
            self.offset += len(self.vocabulary.text_of(token_id))
        return {
            "tokens": [self._name(token_id) for token_id, _, _ in scored],
            "token_logprobs": [logprob for _, logprob, _ in scored],
            "top_logprobs": [self._best(entry, n_best) for entry in scored],
            "text_offset": offsets,
        }

    def _best(self, scored: Scored, n_best: int) -> Json | None:
        """Return the likeliest tokens and the chosen one; the first token of all has none."""
        token_id, logprob, alternatives = scored
        if logprob is None:
            return None
        named = {self._name(each): value for each, value in alternatives[:n_best]}
        return named | {self._name(token_id): logprob}

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_ids else self.vocabulary.text_of(token_id)


def prompt_logprobs(scored: Sequence[Scored], n_best: int, vocabulary: Vocabulary) -> list[Any]:
    """Return the prompt's tokens by id with ranks, as vLLM does; the first has none."""
    found: list[Json | None] = []
    for token_id, logprob, alternatives in scored:
        if logprob is None:
            found.append(None)
            continue
        rows = {str(token_id): _ranked(token_id, logprob, None, vocabulary)}
        for rank, (each, value) in enumerate(alternatives[:n_best], 1):
            rows[str(each)] = _ranked(each, value, rank, vocabulary)
        found.append(rows)
    return found


def _ranked(token_id: int, logprob: float, rank: int | None, vocabulary: Vocabulary) -> Json:
    return {"logprob": logprob, "rank": rank, "decoded_token": vocabulary.text_of(token_id)}
