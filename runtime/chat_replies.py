"""Replies of /v1/chat/completions, out of the events of their texts."""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from edgekd.runtime.messages import Finished, PromptRead, Token
from edgekd.runtime.openai_replies import (
    Envelope,
    chat_choice,
    chat_delta,
    chat_logprobs,
    finish_reason,
    stream,
    usage,
)
from edgekd.runtime.openai_requests import ChatRequest
from edgekd.runtime.sse import event
from edgekd.runtime.texts import Run, Vocabulary
from edgekd.runtime.timings import Timings
from edgekd.runtime.tool_calls import Call, CallReader

Json = dict[str, Any]


@dataclass
class _Choice:
    """One text of a reply."""

    reader: CallReader | None
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    end: Finished | None = None


@dataclass
class ChatReply:
    """The reply to one request."""

    asked: ChatRequest
    envelope: Envelope
    n_prompt_tokens: int
    vocabulary: Vocabulary | None
    """Only where log-probabilities are wanted."""

    def __post_init__(self) -> None:
        """Begin every choice."""
        is_forced = bool(self.asked.forced_tools())
        self._choices = [
            _Choice(CallReader(in_call=is_forced) if self.asked.shown_tools() else None)
            for _ in range(self.asked.n_texts())
        ]

    async def whole(self, run: Run) -> Json:
        """Return the reply in one piece."""
        async for index, happened in run.events():
            choice = self._choices[index]
            choice.timings.note(happened)
            if isinstance(happened, Token):
                choice.tokens.append(happened)
            if isinstance(happened, Finished):
                choice.end = happened
            for said in _read(choice, happened):
                if isinstance(said, str):
                    choice.text += said
                else:
                    choice.calls.append(said)
        choices = [self._finished(index, choice) for index, choice in enumerate(self._choices)]
        return self.envelope.whole(choices, self._usage(), self._choices[0].timings.as_json())

    async def parts(self, run: Run) -> AsyncIterator[str]:
        """Yield the reply as server-sent events."""
        blank = {"usage": None} if self.asked.stream_options.include_usage else {}
        for index in range(self.asked.n_texts()):
            opening = {"role": "assistant", "content": ""}
            yield event(self.envelope.part([chat_delta(index, opening)]) | blank)
        timings = [choice.timings for choice in self._choices]
        deltas, counts = self._deltas, self._usage
        async for part in stream(run, self.asked, self.envelope, timings, deltas, counts):
            yield part

    def _deltas(self, index: int, happened: Any) -> Iterable[Json]:
        """Yield the choices of a stream that say what ``happened``."""
        choice = self._choices[index]
        logprobs = self._logprobs([happened]) if isinstance(happened, Token) else None
        for said in _read(choice, happened):
            if isinstance(said, str):
                yield chat_delta(index, {"content": said}, logprobs)
                logprobs = None
            else:
                call = {"index": len(choice.calls)} | said.as_json()
                choice.calls.append(said)
                yield chat_delta(index, {"tool_calls": [call]})
        if logprobs:  # of a token whose text is held back
            yield chat_delta(index, {"content": ""}, logprobs)
        if isinstance(happened, PromptRead):
            yield chat_delta(index, {})
        if isinstance(happened, Finished):
            choice.end = happened
            yield chat_delta(index, {}, None, finish_reason(happened, len(choice.calls)))

    def _finished(self, index: int, choice: _Choice) -> Json:
        assert choice.end
        found = chat_choice(index, choice.text, choice.calls, self._logprobs(choice.tokens))
        return found | {"finish_reason": finish_reason(choice.end, len(choice.calls))}

    def _logprobs(self, tokens: list[Token]) -> Json | None:
        return chat_logprobs(tokens, self.vocabulary) if self.vocabulary else None

    def _usage(self) -> Json:
        ends = [choice.end for choice in self._choices if choice.end]
        return usage(ends, self.n_prompt_tokens)


def _read(choice: _Choice, happened: Any) -> Iterable[str | Call]:
    """Yield the text and the calls that become certain with ``happened``."""
    if not isinstance(happened, Token | Finished):
        return
    if choice.reader is None:
        if happened.text:
            yield happened.text
        return
    yield from choice.reader.feed(happened.text)
    if isinstance(happened, Finished):
        yield from choice.reader.end()
