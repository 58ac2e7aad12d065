"""Answers of llama-server's own routes, with the fields that its README describes."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgekd.runtime.generation_settings import settings_of
from edgekd.runtime.messages import (
    Event,
    Finished,
    GenerationRequest,
    PromptRead,
    Started,
    Token,
)
from edgekd.runtime.native_requests import NativeRequest
from edgekd.runtime.openai_replies import with_rivals
from edgekd.runtime.sse import event
from edgekd.runtime.texts import Run, Vocabulary
from edgekd.runtime.timings import Timings

Json = dict[str, Any]


@dataclass
class _Text:
    """One completion in the making."""

    request: GenerationRequest
    slot: int = -1
    content: str = ""
    tokens: list[Token] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    end: Finished | None = None


@dataclass
class NativeReply:
    """The answer to one request to /completion."""

    asked: NativeRequest
    alias: str
    n_ctx: int
    requests: Sequence[GenerationRequest]
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        """Begin every completion."""
        self._texts = [_Text(request) for request in self.requests]

    async def whole(self, run: Run) -> Json | list[Json]:
        """Return the answer: an object, or an array where several were asked for."""
        async for index, happened in run.events():
            self._take(self._texts[index], happened)
        found = [self._final(index, text) for index, text in enumerate(self._texts)]
        return found if self.asked.is_list else found[0]

    async def parts(self, run: Run) -> AsyncIterator[str]:
        """Yield the answer as server-sent events; the last one of each text has every field."""
        async for index, happened in run.events():
            text = self._texts[index]
            self._take(text, happened)
            if isinstance(happened, PromptRead) or (
                isinstance(happened, Token) and self.asked.limit()
            ):
                yield event(self._part(index, text, happened))
            elif isinstance(happened, Finished):
                yield event(self._final(index, text))

    def _take(self, text: _Text, happened: Event) -> None:
        text.timings.note(happened)
        if isinstance(happened, Started):
            text.slot = happened.slot
        elif isinstance(happened, Token):
            text.tokens.append(happened)
            text.content += happened.text
        elif isinstance(happened, Finished):
            text.content += happened.text
            text.end = happened

    def _part(self, index: int, text: _Text, happened: Token | PromptRead) -> Json:
        tokens = [happened] if isinstance(happened, Token) else []
        found: Json = {
            "index": index,
            "content": "".join(token.text for token in tokens),
            "tokens": [token.token_id for token in tokens],
            "stop": False,
            "id_slot": text.slot,
            "tokens_predicted": len(text.tokens),
            "tokens_evaluated": len(text.request.prompt_ids),
        }
        if self.asked.n_probs and tokens:
            found["completion_probabilities"] = self._probabilities(tokens)
        return found | text.timings.beside(happened, each_token=self.asked.timings_per_token)

    def _final(self, index: int, text: _Text) -> Json:
        end, is_stream = text.end, self.asked.stream
        assert end
        is_empty = self.asked.limit() == 0
        tokens = [] if is_empty else text.tokens
        content = "" if is_empty else text.content
        n_made = 0 if is_empty else end.n_generated
        found: Json = {
            "index": index,
            # A stream gave the text already, but for what was held back.
            "content": ("" if is_empty else end.text) if is_stream else content,
            "tokens": [t.token_id for t in tokens]
            if self.asked.return_tokens and not is_stream
            else [],
            "id_slot": text.slot,
            "stop": True,
            "model": self.alias,
            "tokens_predicted": n_made,
            "tokens_evaluated": end.n_prompt,
            "tokens_cached": end.n_cached,
            "generation_settings": settings_of(
                self.asked, text.request.params, self.n_ctx, self.alias
            ),
            "prompt": b"".join(map(self.vocabulary.bytes_of, text.request.prompt_ids)).decode(
                "utf-8", "replace"
            ),
            "has_new_line": "\n" in content,
            "truncated": end.stop_kind == "limit" and n_made != self.asked.limit(),
            "stop_type": end.stop_kind,
            "stopping_word": end.stop_string or "",
            "timings": replace(text.timings, n_made=n_made).as_json(),
        }
        if self.asked.n_probs and not is_stream:
            found["completion_probabilities"] = self._probabilities(tokens)
        return _chosen(found, self.asked.response_fields)

    def _probabilities(self, tokens: Sequence[Token]) -> list[Json]:
        scored = (token.scored for token in tokens)
        return with_rivals(scored, self.vocabulary, as_probs=self.asked.post_sampling_probs)


def _chosen(found: Json, names: Sequence[str]) -> Json:
    """Return the fields ``names``; ``a/b`` moves b of a to the top, what is missing is left out."""
    if not names:
        return found
    chosen: Json = {}
    for name in names:
        value: Any = found
        for key in name.split("/"):
            value = value.get(key, ...) if isinstance(value, dict) else ...
        if value is not ...:
            chosen[name.rpartition("/")[2]] = value
    return chosen
