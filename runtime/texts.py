"""Requests from the event loop to the engine process, and their events back.

A run is what one HTTP request asks for: one text, or several side by side. Who leaves it early,
by an error or because the client has gone, cancels what is left of it.
"""

import asyncio
import uuid
from base64 import b64decode
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from edgekd.errors import EngineUnavailableError
from edgekd.runtime.api_errors import ApiError, failure
from edgekd.runtime.engine_process import EngineInfo, EngineProcess
from edgekd.runtime.grammar import check_grammar
from edgekd.runtime.messages import Event, Failed, Finished, GenerationRequest, Started, Token
from edgekd.runtime.serve_metrics import Metrics

if TYPE_CHECKING:
    from fastapi import Request

    from edgekd.runtime.generation_fields import GenerationFields

CALL_S = 60.0
"""A megabyte of text is tokenized in about a second, on small devices in ten."""


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of every token."""

    tokens: tuple[bytes, ...]
    """Names of special tokens included."""
    special: frozenset[int]

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token, a special token's name included."""
        return self.tokens[token_id] if 0 <= token_id < len(self.tokens) else b""

    def text_of(self, token_id: int) -> str:
        """Return the text of a token; a part of a character shows as a replacement mark."""
        return self.bytes_of(token_id).decode("utf-8", "replace")


@dataclass
class Live:
    """A text from its submission to its end, for who asks what the server is doing."""

    asked: "GenerationFields"
    request: GenerationRequest
    number: int
    n_decoded: int = 0
    has_new_line: bool = False

    def note(self, event: Event) -> None:
        """Take in one event of the text."""
        if isinstance(event, Token):
            self.n_decoded += 1
            self.has_new_line = self.has_new_line or "\n" in event.text


class Texts:
    """One engine process, as the server's routes use it."""

    def __init__(self, engine: EngineProcess, metrics: Metrics, timeout_s: float) -> None:
        """Ask ``engine``; no request lives longer than ``timeout_s``."""
        self.engine = engine
        self.metrics = metrics
        self.timeout_s = timeout_s
        self.mail = _Mail()
        self.live: dict[str, Live] = {}
        self.numbers = count()
        self._facts: dict[str, Any] = {}

    @property
    def info(self) -> EngineInfo:
        """What the engine is.

        Raises:
            EngineUnavailableError: it never was ready yet.
        """
        if self.engine.info is None:
            raise EngineUnavailableError(f"the engine is {self.engine.state}; try again later")
        return self.engine.info

    async def call(self, name: str, **arguments: Any) -> Any:
        """Return the answer to a question about text.

        Raises:
            EngineUnavailableError: the engine is down, or takes too long.
        """
        future = self.engine.call(name, **arguments)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), CALL_S)
        except TimeoutError as error:
            raise EngineUnavailableError(f"the tokenizer took over {CALL_S:.0f} s") from error

    async def encode(self, prompt: str | list[int], **flags: bool) -> list[int]:
        """Return the ids of a prompt that may be ids already."""
        if isinstance(prompt, list):
            return prompt
        found: list[int] = await self.call("encode", text=prompt, **flags)
        return found

    async def vocabulary(self) -> Vocabulary:
        """Return the vocabulary, which is the same for every process of the model."""
        if "vocabulary" not in self._facts:
            found = await self.call("vocabulary")
            tokens = tuple(map(b64decode, found["tokens"]))
            self._facts["vocabulary"] = Vocabulary(tokens, frozenset(found["special"]))
        kept: Vocabulary = self._facts["vocabulary"]
        return kept

    async def describe(self) -> dict[str, Any]:
        """Return what the model's files say; see edgekd.runtime.text_calls."""
        if "model" not in self._facts:
            self._facts["model"] = await self.call("describe")
        kept: dict[str, Any] = self._facts["model"]
        return kept

    def room(self, n_prompt: int) -> int:
        """Return a number of tokens that no text behind a prompt can have more of.

        Raises:
            ApiError: not even the prompt does.
        """
        context_tokens = self.info.context_tokens
        if n_prompt > context_tokens:
            message = (
                f"the prompt has {n_prompt} tokens, the context holds {context_tokens}; shorten it"
            )
            raise ApiError(400, message, code="context_length_exceeded", param="prompt")
        return context_tokens

    @asynccontextmanager
    async def run(
        self,
        client: "Request",
        asked: "GenerationFields",
        requests: Sequence[GenerationRequest],
    ) -> AsyncIterator["Run"]:
        """Run ``requests`` of one body side by side; leaving cancels those that have not ended.

        Raises:
            ApiError: a request has no chance.
            QueueFullError: too many requests wait already.
        """
        most = self.engine.max_requests
        if len(requests) > most:  # they could never run side by side, however often asked for
            message = f"{len(requests)} texts in one request, {most} are allowed; ask for fewer"
            raise ApiError(400, message, code="invalid_value", param="n")
        for request in requests:
            if request.grammar:
                check_grammar(request.grammar)
        run = Run(self, asked)
        watch = asyncio.create_task(_until_gone(client, run))
        try:
            for request in requests:
                run.submit(request)
            yield run
        finally:
            watch.cancel()
            run.close()


@dataclass
class Run:
    """Texts in the making."""

    texts: Texts
    asked: "GenerationFields"
    open: dict[str, int] = field(default_factory=dict)
    """The index of every request that has not ended."""
    _arrived: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    _first: list[tuple[int, Event]] = field(default_factory=list)

    def submit(self, request: GenerationRequest) -> None:
        """Hand one more request to the engine."""
        loop = asyncio.get_running_loop()
        index = len(self.open)
        texts = self.texts
        track = texts.metrics.follow(request)
        texts.live[request.id] = live = Live(self.asked, request, next(texts.numbers))

        def deliver(event: Event) -> None:
            track(event)
            live.note(event)
            if isinstance(event, Finished | Failed):
                texts.live.pop(request.id, None)
            texts.mail.post(loop, self._arrived, event)

        try:
            texts.engine.submit(request, deliver)
        except BaseException:
            texts.live.pop(request.id, None)
            raise
        self.open[request.id] = index

    async def begin(self) -> None:
        """Return when the first text begins: what fails until then has a status of its own."""
        while True:
            found = await self._next()
            self._first.append(found)
            if not isinstance(found[1], Started):
                return

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield each event with its request's index, until the last text ends.

        Raises:
            ApiError: one of them failed.
        """
        for found in self._first:
            yield found
        while self.open:
            yield await self._next()

    def close(self) -> None:
        """Cancel what has not ended."""
        for request_id in self.open:
            self.texts.engine.cancel(request_id)
        self.open.clear()

    async def _next(self) -> tuple[int, Event]:
        event = await self._arrived.get()
        index = self.open[event.id]
        if isinstance(event, Finished | Failed):
            del self.open[event.id]
        if isinstance(event, Failed):
            raise failure(event)
        return index, event


class _Mail:
    """Events on their way from the engine's thread to the event loop.

    The loop is woken once for all that a step of the engine brings, not for each event: the
    server shares its cores with the engine.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[asyncio.Queue[Event], Event]] = deque()
        self._is_loop_called = False

    def post(
        self, loop: asyncio.AbstractEventLoop, target: asyncio.Queue[Event], event: Event
    ) -> None:
        """Put ``event`` into ``target`` soon, on the thread of ``loop``."""
        self._waiting.append((target, event))
        if not self._is_loop_called:
            self._is_loop_called = True
            with suppress(RuntimeError):  # the server was stopped, and its event loop with it
                loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._is_loop_called = False  # first: what is posted from now on may come too late
        while self._waiting:
            target, event = self._waiting.popleft()
            target.put_nowait(event)


def new_id() -> str:
    """Return a request id that no other request has."""
    return uuid.uuid4().hex


async def _until_gone(client: "Request", run: Run) -> None:
    """Cancel ``run`` when the client hangs up; each wakes up who waits for events."""
    while (await client.receive())["type"] != "http.disconnect":
        pass
    for request_id in list(run.open):
        run.texts.engine.cancel(request_id)
