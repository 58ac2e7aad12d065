"""Replies of /v1/completions, out of the events of their texts."""

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgekd.runtime.messages import (
    Event,
    Finished,
    PromptRead,
    PromptScored,
    Scored,
    Token,
)
from edgekd.runtime.openai_replies import (
    Envelope,
    TextLogprobs,
    finish_reason,
    prompt_logprobs,
    stream,
    text_choice,
    usage,
    with_rivals,
)
from edgekd.runtime.openai_requests import CompletionRequest
from edgekd.runtime.texts import Run, Vocabulary
from edgekd.runtime.timings import Timings

Json = dict[str, Any]


@dataclass
class _Choice:
    """One text of a reply."""

    logprobs: TextLogprobs
    prompt: str
    is_echoed: bool = False
    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    prompt_scored: list[Scored] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    end: Finished | None = None


@dataclass
class TextReply:
    """The reply to one request: ``n`` choices for each prompt."""

    asked: CompletionRequest
    envelope: Envelope
    prompts: Sequence[list[int]]
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        """Begin every choice."""
        as_ids = self.asked.return_tokens_as_token_ids
        self._choices = [
            _Choice(TextLogprobs(self.vocabulary, as_ids), self._text_of(prompt))
            for prompt in self.asked.prompts()
            for _ in range(self.asked.n_texts())
        ]

    async def whole(self, run: Run) -> Json:
        """Return the reply in one piece."""
        async for index, happened in run.events():
            choice = self._choices[index]
            choice.timings.note(happened)
            choice.text += self._take(choice, happened)
        choices = [self._finished(index, choice) for index, choice in enumerate(self._choices)]
        return self.envelope.whole(choices, self._usage(), self._choices[0].timings.as_json())

    def parts(self, run: Run) -> AsyncIterator[str]:
        """Yield the reply as server-sent events."""
        timings = [choice.timings for choice in self._choices]
        return stream(run, self.asked, self.envelope, timings, self._deltas, self._usage)

    def _take(self, choice: _Choice, happened: Event) -> str:
        """Note what ``happened`` and return the text that it adds."""
        if isinstance(happened, PromptScored):
            choice.prompt_scored += happened.tokens
            if self.asked.echo and self.asked.n_alternatives() is not None:
                choice.scored += happened.tokens
            return ""
        if not isinstance(happened, Token | Finished):
            return ""
        text = ""
        if self.asked.echo and not choice.is_echoed:
            choice.is_echoed, text = True, choice.prompt
        if isinstance(happened, Finished):
            choice.end = happened
        if self.asked.limit() == 0:
            return text
        if isinstance(happened, Token):
            choice.scored.append(happened.scored)
        return text + happened.text

    def _deltas(self, index: int, happened: Event) -> Iterable[Json]:
        choice = self._choices[index]
        text = self._take(choice, happened)
        logprobs = None
        if choice.scored and not isinstance(happened, PromptScored):
            logprobs = self._logprobs(choice)
            choice.scored = []
        reason = finish_reason(choice.end) if choice.end else None
        if text or logprobs or reason or isinstance(happened, PromptRead):
            yield text_choice(index, text, logprobs, reason)

    def _finished(self, index: int, choice: _Choice) -> Json:
        assert choice.end
        reason = finish_reason(choice.end)
        found = text_choice(index, choice.text, self._logprobs(choice), reason)
        if (n_best := self.asked.prompt_logprobs) is not None:
            scored = choice.prompt_scored
            found["prompt_logprobs"] = prompt_logprobs(scored, n_best, self.vocabulary)
        return found

    def _logprobs(self, choice: _Choice) -> Json | None:
        """Return the log-probabilities of what was said; ``n_probs`` adds llama-server's form."""
        n_best = self.asked.n_alternatives()
        if n_best is None:
            return None
        found = choice.logprobs.of(choice.scored, n_best)
        if self.asked.n_probs:
            found["content"] = with_rivals(choice.scored, self.vocabulary)
        return found

    def _usage(self) -> Json:
        ends = [choice.end for choice in self._choices if choice.end]
        n_prompt_tokens = sum(map(len, self.prompts))
        return usage(ends, n_prompt_tokens, none_made=self.asked.limit() == 0)

    def _text_of(self, prompt: str | list[int]) -> str:
        """Return the text of a prompt that may be token ids."""
        if isinstance(prompt, str):
            return prompt
        return b"".join(map(self.vocabulary.bytes_of, prompt)).decode("utf-8", "replace")
