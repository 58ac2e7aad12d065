"""The JSON of OpenAI's API: what is accepted, what is refused, how replies and errors look.

A field that would change the reply and is not supported is refused, never ignored in silence.
Imports pydantic, so only the server imports this.
"""

import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgekd.errors import EdgekdError, EngineError
from edgekd.runtime.chat_template import Message
from edgekd.runtime.generate import FinishReason
from edgekd.runtime.sampling import MAX_SEED, MAX_TEMPERATURE, SamplingParams

Json = dict[str, Any]

_IGNORED = {
    "include_obfuscation",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Unsupported fields, and the values with which they ask for what is done anyway."""


class ApiError(Exception):
    """A request that is refused, or fails, with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        type: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Say what happened; ``code`` is for programs, ``message`` for people."""
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body: Json = {"error": {"message": message, "type": type, "code": code}}


def as_api_error(error: Exception) -> ApiError:
    """Return what the client is told of ``error``."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_error", type="server_error")
    if isinstance(error, EdgekdError):
        return ApiError(400, str(error), code="invalid_value")
    message = "internal error; the server's log has the details"
    return ApiError(500, message, code="internal_error", type="server_error")


def describe_faults(faults: Iterable[Any]) -> str:
    """Return pydantic's ``faults`` as one line that names each field."""
    lines = []
    for fault in faults:
        where = ".".join(str(part) for part in fault["loc"] if part != "body")
        message = fault["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {message}" if where else message)
    return "; ".join(lines)[:2000]


class _Asked(BaseModel):
    """JSON of a request: null is left out, unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_has_no_effect(cls, found: Any) -> Any:
        if not isinstance(found, dict):
            return found
        kept = {
            name: value
            for name, value in found.items()
            if name in cls.model_fields
            or not (value is None or name in _IGNORED or value in _WITHOUT_EFFECT.get(name, ()))
        }
        if unknown := sorted(kept.keys() - cls.model_fields.keys()):
            raise ValueError(
                f"not supported: {', '.join(unknown)}; leave out what this server cannot honor"
            )
        return {name: value for name, value in kept.items() if value is not None}


class TextPart(_Asked):
    """One part of a message; images and sound are not supported."""

    type: Literal["text"]
    text: str


class ChatMessage(_Asked):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def for_template(self) -> Message:
        """Return the message as chat templates expect it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class StreamOptions(_Asked):
    """What a stream carries besides text."""

    include_usage: bool = False


StopString = Annotated[str, Field(min_length=1, max_length=128)]
_Tokens = Annotated[int, Field(ge=1, le=MAX_SEED)]


class _GenerationRequest(_Asked):
    """What both kinds of request share; the defaults are OpenAI's."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float = Field(1.0, ge=0, le=MAX_TEMPERATURE)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0, le=MAX_SEED)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] = []
    max_tokens: _Tokens | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_no_text(cls, found: Any) -> Any:
        if isinstance(found, bytes):  # FastAPI's way to say that it was not sent as JSON
            raise ValueError("the body is not JSON; send it with Content-Type: application/json")
        try:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        except (UnicodeEncodeError, RecursionError):
            raise ValueError(
                "half a surrogate pair, or nesting too deep; send plain text"
            ) from None
        return found

    def sampling(self, default_tokens: int) -> SamplingParams:
        """Return the settings that were asked for."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            max_tokens=self.max_tokens or default_tokens,
        )


class ChatRequest(_GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: _Tokens | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self


class CompletionRequest(_GenerationRequest):
    """Body of /v1/completions."""

    prompt: str
    max_tokens: _Tokens | None = 16


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Return the count of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True)
class ReplyShape:
    """The JSON around one reply's text; id and time are the same in all its parts."""

    alias: str
    is_chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: FinishReason, counts: Json) -> Json:
        """Return the reply in one piece."""
        message = {"role": "assistant", "content": text}
        said = {"message": message} if self.is_chat else {"text": text}
        return self._envelope([self._choice(said, reason)], "") | {"usage": counts}

    def opening(self) -> list[Json]:
        """Return what a stream begins with."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})] * self.is_chat

    def part(self, text: str, reason: FinishReason | None) -> list[Json]:
        """Return the parts of a stream that carry ``text``, and ``reason`` where it ends."""
        if not self.is_chat:
            return [self._chunk({"text": text}, reason)] if text or reason else []
        parts = [self._chunk({"delta": {"content": text}})] if text else []
        return parts + ([self._chunk({"delta": {}}, reason)] if reason else [])

    def counts(self, counts: Json) -> Json:
        """Return the part of a stream that carries the count of tokens."""
        return self._envelope([], ".chunk") | {"usage": counts}

    def _chunk(self, said: Json, reason: FinishReason | None = None) -> Json:
        return self._envelope([self._choice(said, reason)], ".chunk")

    def _choice(self, said: Json, reason: FinishReason | None) -> Json:
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}

    def _envelope(self, choices: list[Json], suffix: str) -> Json:
        kind, prefix = ("chat.completion" + suffix, "chatcmpl-")
        if not self.is_chat:
            kind, prefix = ("text_completion", "cmpl-")
        head = {"id": prefix + self.id, "object": kind, "created": self.created}
        return {**head, "model": self.alias, "choices": choices}
