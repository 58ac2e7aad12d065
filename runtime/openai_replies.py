"""The JSON of OpenAI's replies, whole and in parts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgekd.runtime.messages import Finished, Scored, Token
from edgekd.runtime.texts import Vocabulary, new_id
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

    def whole(self, choices: list[Json], counts: Json) -> Json:
        """Return a reply in one piece."""
        return self._around(choices, "chat.completion") | {"usage": counts}

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


def chat_logprobs(tokens: Sequence[Token], vocabulary: Vocabulary) -> Json:
    """Return the log-probabilities of ``tokens`` as chats have them."""
    found = []
    for token in tokens:
        best = [_entry(each, logprob, vocabulary) for each, logprob in token.alternatives]
        entry = _entry(token.token_id, token.logprob, vocabulary)
        found.append(entry | {"top_logprobs": best})
    return {"content": found, "refusal": None}


def _entry(token_id: int, logprob: float | None, vocabulary: Vocabulary) -> Json:
    raw = vocabulary.bytes_of(token_id)
    text = raw.decode("utf-8", "replace")
    return {"token": text, "logprob": logprob, "bytes": list(raw)}


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
