"""Many requests on one engine: continuous batching, driven by ``step()``.

Every step gives each running text its next token and works off a part of the waiting prompts,
in one pass over the weights. No threads, no clock but the one given, no HTTP.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgekd.errors import EngineError, QueueFullError, RecipeError
from edgekd.runtime.batch_engine import BatchEngine, Work
from edgekd.runtime.grammar import Grammar, Matcher
from edgekd.runtime.messages import (
    Event,
    Failed,
    FailureCode,
    Finished,
    GenerationRequest,
    PromptRead,
    PromptScored,
    Started,
    StopKind,
    Token,
)
from edgekd.runtime.pace import Pace
from edgekd.runtime.sampling import Choice, Sampler, check_vocabulary, with_logprobs
from edgekd.runtime.slots import Slots
from edgekd.runtime.stops import TextOut
from edgekd.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgekd.runtime.engine import Logits

# N outputs of one request's part of a step, V vocabulary

MAX_WAITING = 32


@dataclass
class _Running:
    """One request from its submission to its end."""

    request: GenerationRequest
    sampler: Sampler
    out: TextOut
    matcher: Matcher | None
    submitted_s: float
    slot: int = -1
    n_cached: int = 0
    n_computed: int = 0
    """Tokens of the prompt that are in the cache."""
    started_s: float = 0.0
    first_token_s: float | None = None
    next_id: int = -1
    """The token chosen last, which the cache does not hold yet."""
    n_generated: int = 0
    has_line_break: bool = False

    @property
    def is_prompt(self) -> bool:
        """Whether a part of the prompt is still to be computed."""
        return self.n_computed < len(self.request.prompt_ids)

    def is_late(self, now_s: float) -> bool:
        """Whether the deadline has passed."""
        limit_s = self.request.deadline_s
        return limit_s is not None and now_s - self.submitted_s > limit_s

    def is_long_enough(self, now_s: float) -> bool:
        """Whether the text has as many tokens, or has taken as long, as was asked for."""
        params = self.request.params
        if self.n_generated >= params.max_tokens:
            return True
        if params.max_predict_ms is None or not self.has_line_break:
            return False
        assert self.first_token_s is not None
        return (now_s - self.first_token_s) * 1e3 > params.max_predict_ms


@dataclass
class Counters:
    """Totals since the start, for metrics."""

    requests: int = 0
    prompt_tokens: int = 0
    """Prompt tokens computed."""
    cached_tokens: int = 0
    """Prompt tokens taken from a cache."""
    generated_tokens: int = 0
    steps: int = 0
    busy_s: float = 0.0
    """Seconds in the engine."""


@dataclass(frozen=True)
class Snapshot:
    """What a scheduler is doing now."""

    n_waiting: int
    n_running: int
    slot_tokens: tuple[int, ...]
    """Tokens in the KV cache of each slot."""
    slot_requests: tuple[str | None, ...]
    """The request in each slot."""
    counters: Counters = field(default_factory=Counters)


class Scheduler:
    """Takes requests, gives events; ``step`` does a bounded piece of work."""

    def __init__(
        self,
        engine: BatchEngine,
        tokenizer: Tokenizer,
        *,
        max_waiting: int = MAX_WAITING,
        compile_grammar: Callable[[Grammar], Matcher] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Use ``engine``, which nothing else may touch from now on."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._max_waiting = max_waiting
        self._compile_grammar = compile_grammar
        self._clock = clock
        self._slots = Slots(engine)
        self._pace = Pace(engine.batch_tokens)
        self._waiting: list[_Running] = []
        self._running: list[_Running] = []  # in the order of admission
        self._counters = Counters()

    @property
    def is_idle(self) -> bool:
        """Whether a step would have nothing to do."""
        return not (self._waiting or self._running)

    def submit(self, request: GenerationRequest) -> None:
        """Queue ``request``.

        Raises:
            QueueFullError: too many requests wait already.
            RecipeError: the request cannot be met, whatever the engine is doing.
        """
        # A request that waits for no more than the next step has a slot, in effect.
        most = self._engine.n_slots + self._max_waiting
        if len(self._waiting) + len(self._running) >= most:
            raise QueueFullError(f"{most} requests are running or waiting; try again later")
        self._check(request)
        matcher = None if request.grammar is None else self._matcher(request.grammar)
        stop_ids = self._tokenizer.stop_ids
        sampler = Sampler(request.params, request.prompt_ids, stop_ids)
        out = TextOut(self._tokenizer, request.params.stop)
        self._waiting.append(_Running(request, sampler, out, matcher, self._clock()))
        self._counters.requests += 1

    def cancel(self, request_id: str) -> list[Event]:
        """End a request, waiting or running; harmless after its end."""
        return self._drop(lambda each: each.request.id == request_id, "cancelled", "cancelled")

    def step(self) -> list[Event]:
        """Do one step of the engine and return what happened."""
        now_s = self._clock()
        events = self._drop(
            lambda each: each.is_late(now_s), "deadline", "the time limit of the request is over"
        )
        events += self._admit(now_s)
        planned = self._plan()
        if not planned:
            return events
        try:
            logits = self._engine.step([work for _, work in planned])
        except EngineError as error:
            return events + self._fail_all(error)
        self._note(planned, self._clock() - now_s)
        for (running, work), logits_NV in zip(planned, logits, strict=True):
            events += self._advance(running, work, logits_NV)
        return events

    def snapshot(self) -> Snapshot:
        """Return what is going on."""
        ids = {running.slot: running.request.id for running in self._running}
        n_slots = self._engine.n_slots
        return Snapshot(
            len(self._waiting),
            len(self._running),
            tuple(self._slots.n_tokens(slot) for slot in range(n_slots)),
            tuple(ids.get(slot) for slot in range(n_slots)),
            self._counters,
        )

    def _check(self, request: GenerationRequest) -> None:
        n_prompt, room = len(request.prompt_ids), self._engine.context_tokens
        vocab_size, n_slots = self._engine.vocab_size, self._engine.n_slots
        if n_prompt == 0:
            raise RecipeError("the prompt has no tokens, at least one is needed; give some text")
        if n_prompt > room:
            raise RecipeError(
                f"the prompt has {n_prompt} tokens, the context holds {room}; shorten it"
            )
        if not all(0 <= token_id < vocab_size for token_id in request.prompt_ids):
            raise RecipeError(f"token ids go from 0 to {vocab_size - 1}; the prompt has others")
        if request.slot is not None and not 0 <= request.slot < n_slots:
            raise RecipeError(f"there is no slot {request.slot}, they go from 0 to {n_slots - 1}")
        check_vocabulary(request.params, vocab_size)

    def _matcher(self, grammar: Grammar) -> Matcher:
        if self._compile_grammar is None:
            raise RecipeError("this server was started without grammars; leave it out")
        return self._compile_grammar(grammar)

    def _drop(
        self, is_meant: Callable[[_Running], bool], code: FailureCode, message: str
    ) -> list[Event]:
        meant = [each for each in (*self._waiting, *self._running) if is_meant(each)]
        return [self._fail(each, code, message) for each in meant]

    def _admit(self, now_s: float) -> list[Event]:
        """Give free slots to those who wait longest; one whose own slot is busy is passed by."""
        events: list[Event] = []
        for waiting in list(self._waiting):
            request = waiting.request
            reuse = request.reuse_prefix and request.prompt_logprobs is None
            claim = self._slots.claim(request.prompt_ids, request.slot, reuse=reuse)
            if claim is None:
                continue
            self._waiting.remove(waiting)
            self._running.append(waiting)
            waiting.slot, waiting.started_s = claim.slot, now_s
            waiting.n_cached = waiting.n_computed = claim.n_cached
            self._counters.cached_tokens += claim.n_cached
            n_prompt, waited_s = len(request.prompt_ids), now_s - waiting.submitted_s
            self._pace.admit(n_prompt - claim.n_cached)
            events.append(Started(request.id, claim.slot, n_prompt, claim.n_cached, waited_s))
        return events

    def _plan(self) -> list[tuple[_Running, Work]]:
        """Return what the next step does: a token for every text, and parts of prompts."""
        texts = [each for each in self._running if not each.is_prompt]
        prompts = [each for each in self._running if each.is_prompt]
        planned = [(each, Work(each.slot, [each.next_id])) for each in texts]
        n_wanted = sum(len(each.request.prompt_ids) - each.n_computed for each in prompts)
        budget = self._pace.prompt_tokens(len(texts), n_wanted)
        n_rows_left = self._engine.max_outputs - len(texts)
        for each in prompts:
            if budget <= 0 or n_rows_left <= 0:
                break
            work = _next_part(each, budget, n_rows_left)
            planned.append((each, work))
            budget -= len(work.ids)
            n_rows_left -= work.n_outputs
        return planned

    def _note(self, planned: list[tuple[_Running, Work]], duration_s: float) -> None:
        """Count what the engine did."""
        n_prompt = sum(len(work.ids) for running, work in planned if running.is_prompt)
        n_texts = sum(not running.is_prompt for running, _ in planned)
        self._pace.note(n_texts, n_prompt, duration_s)
        self._counters.steps += 1
        self._counters.busy_s += duration_s
        self._counters.prompt_tokens += n_prompt
        for running, work in planned:
            self._slots.extend(running.slot, work.ids)

    def _advance(self, running: _Running, work: Work, logits_NV: "Logits") -> list[Event]:
        """Take in what the engine gave for one request."""
        events: list[Event] = []
        if running.is_prompt:
            events += _prompt_scores(running, work, logits_NV)
            running.n_computed += len(work.ids)
            if running.request.report_progress:
                elapsed_s = self._clock() - running.started_s
                events.append(PromptRead(running.request.id, running.n_computed, elapsed_s))
            if running.is_prompt:
                return events
        try:
            allowed_V = running.matcher.allowed() if running.matcher else None
            choice = running.sampler.choose(logits_NV[-1], allowed_V)
            if running.matcher:
                running.matcher.accept(choice.token_id)
        except EngineError as error:
            return [*events, self._fail(running, "engine_error", str(error))]
        return events + self._accept(running, choice)

    def _accept(self, running: _Running, choice: Choice) -> list[Event]:
        """Add a token to a text, and end it where it ends."""
        self._counters.generated_tokens += 1
        running.n_generated += 1
        running.next_id = choice.token_id
        now_s = self._clock()
        if running.first_token_s is None:
            running.first_token_s = now_s
        if choice.token_id in self._tokenizer.stop_ids:
            return [self._finish(running, "eos")]
        text = running.out.add(choice.token_id)
        running.has_line_break = running.has_line_break or "\n" in text
        token: Event = Token(
            running.request.id,
            choice.token_id,
            text,
            now_s - running.started_s,
            choice.logprob,
            choice.alternatives,
        )
        kind = self._end_of(running, now_s)
        return [token, self._finish(running, kind)] if kind else [token]

    def _end_of(self, running: _Running, now_s: float) -> StopKind | None:
        if running.out.is_stopped:
            return "word"
        if running.matcher and running.matcher.is_complete:
            return "eos"
        is_full = self._engine.length(running.slot) >= self._engine.context_tokens
        return "limit" if is_full or running.is_long_enough(now_s) else None

    def _finish(self, running: _Running, kind: StopKind) -> Event:
        now_s, first_s = self._clock(), running.first_token_s
        assert first_s is not None
        text = "" if running.out.is_stopped else running.out.end()
        self._leave(running)
        return Finished(
            running.request.id,
            "word" if running.out.is_stopped else kind,
            text,
            running.out.matched,
            len(running.request.prompt_ids),
            running.n_cached,
            running.n_generated,
            first_s - running.started_s,
            now_s - first_s,
        )

    def _fail(self, running: _Running, code: FailureCode, message: str) -> Event:
        self._leave(running)
        return Failed(running.request.id, code, message)

    def _fail_all(self, error: EngineError) -> list[Event]:
        """End every running request: what an engine holds after a failure is not known."""
        events = [self._fail(each, "engine_error", str(error)) for each in list(self._running)]
        self._slots.clear()
        return events

    def _leave(self, running: _Running) -> None:
        if running in self._waiting:
            self._waiting.remove(running)
        else:
            self._running.remove(running)
            self._slots.release(running.slot)


def _next_part(running: _Running, budget: int, n_rows_left: int) -> Work:
    """Return the next part of a prompt, with logits where they are needed."""
    request = running.request
    if request.prompt_logprobs is not None:
        budget = min(budget, n_rows_left)
    end = min(running.n_computed + budget, len(request.prompt_ids))
    ids = request.prompt_ids[running.n_computed : end]
    n_outputs = int(end == len(request.prompt_ids))
    return Work(running.slot, ids, len(ids) if request.prompt_logprobs is not None else n_outputs)


def _prompt_scores(running: _Running, work: Work, logits_NV: "Logits") -> list[Event]:
    """Return how likely the prompt's tokens were, where that was asked for."""
    request = running.request
    if request.prompt_logprobs is None:
        return []
    start = running.n_computed + 1
    following = request.prompt_ids[start : start + len(work.ids)]
    choices = [
        with_logprobs(logits_V, token_id, request.prompt_logprobs)
        for logits_V, token_id in zip(logits_NV, following, strict=False)
    ]
    scored = [(each.token_id, each.logprob, each.alternatives) for each in choices]
    if running.n_computed == 0:
        scored.insert(0, (request.prompt_ids[0], None, ()))
    return [PromptScored(request.id, tuple(scored))]
