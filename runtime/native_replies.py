"""Answers of llama-server's own routes, with the fields that its README describes."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from edgekd.runtime.messages import Event, Finished, GenerationRequest, Started, Token
from edgekd.runtime.native_requests import SAMPLERS, NativeRequest
from edgekd.runtime.sse import event
from edgekd.runtime.texts import Run, Vocabulary

Json = dict[str, Any]


@dataclass
class _Text:
    """One completion in the making."""

    request: GenerationRequest
    slot: int = -1
    content: str = ""
    tokens: list[Token] = field(default_factory=list)
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
            if isinstance(happened, Token) and self.asked.limit():
                yield event(self._part(index, text, happened))
            elif isinstance(happened, Finished):
                yield event(self._final(index, text))

    def _take(self, text: _Text, happened: Event) -> None:
        if isinstance(happened, Started):
            text.slot = happened.slot
        elif isinstance(happened, Token):
            text.tokens.append(happened)
            text.content += happened.text
        elif isinstance(happened, Finished):
            text.content += happened.text
            text.end = happened

    def _part(self, index: int, text: _Text, token: Token) -> Json:
        found: Json = {
            "index": index,
            "content": token.text,
            "tokens": [token.token_id],
            "stop": False,
            "id_slot": text.slot,
            "tokens_predicted": len(text.tokens),
            "tokens_evaluated": len(text.request.prompt_ids),
        }
        if self.asked.n_probs:
            found["completion_probabilities"] = self._probabilities([token])
        return found

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
            "generation_settings": settings_of(self.asked, text.request, self.n_ctx, self.alias),
            "prompt": b"".join(map(self.vocabulary.bytes_of, text.request.prompt_ids)).decode(
                "utf-8", "replace"
            ),
            "has_new_line": "\n" in content,
            "truncated": end.stop_kind == "limit" and n_made != self.asked.limit(),
            "stop_type": end.stop_kind,
            "stopping_word": end.stop_string or "",
            "timings": timings(end, n_made),
        }
        if self.asked.n_probs and not is_stream:
            found["completion_probabilities"] = self._probabilities(tokens)
        return _chosen(found, self.asked.response_fields)

    def _probabilities(self, tokens: Sequence[Token]) -> list[Json]:
        return [
            self._scored(token.token_id, token.logprob)
            | {"top_logprobs": [self._scored(*each) for each in token.alternatives]}
            for token in tokens
        ]

    def _scored(self, token_id: int, logprob: float | None) -> Json:
        raw = self.vocabulary.bytes_of(token_id)
        text = raw.decode("utf-8", "replace")
        return {"id": token_id, "token": text, "bytes": list(raw), "logprob": logprob}


def timings(end: Finished, n_made: int) -> Json:
    """Return how fast a text was made; rates of texts do not count the first token."""
    n_prompt, prompt_ms, decode_ms = (
        end.n_prompt - end.n_cached,
        end.prompt_s * 1e3,
        end.decode_s * 1e3,
    )
    n_decoded = max(n_made - 1, 0)
    return {
        "cache_n": end.n_cached,
        "prompt_n": n_prompt,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": _per(prompt_ms, n_prompt),
        "prompt_per_second": _per(n_prompt * 1e3, prompt_ms),
        "predicted_n": n_made,
        "predicted_ms": decode_ms,
        "predicted_per_token_ms": _per(decode_ms, n_decoded),
        "predicted_per_second": _per(n_decoded * 1e3, decode_ms),
    }


def settings_of(
    asked: NativeRequest, request: GenerationRequest | None, n_ctx: int, alias: str
) -> Json:
    """Return the settings that a text is made with."""
    params = request.params if request else asked.sampling(n_ctx, (), 0)
    shown = asdict(params)
    for name in ("logprobs", "max_tokens"):
        del shown[name]
    return shown | {
        "n_ctx": n_ctx,
        "model": alias,
        "seed": -1 if params.seed is None else params.seed,
        "logit_bias": [{"bias": bias, "token": token_id} for token_id, bias in params.logit_bias],
        "n_predict": asked.limit(),
        "max_tokens": asked.limit(),
        "n_probs": asked.n_probs,
        "stream": asked.stream,
        "grammar": asked.grammar or "",
        "samplers": SAMPLERS,
        "timings_per_token": asked.timings_per_token,
        "mirostat": 0,
        "dry_multiplier": 0.0,
        "xtc_probability": 0.0,
        "dynatemp_range": 0.0,
        "n_keep": 0,
        "n_discard": 0,
        "min_keep": 0,
    }


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


def _per(amount: float, count: float) -> float:
    return amount / count if count else 0.0
