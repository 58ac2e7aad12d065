"""The process that holds an engine: requests as JSON lines on stdin, events on stdout.

Native code may crash, run out of memory or hang: it does so here, and not in the server. The
first line in is the settings, the first line out says whether the model could be opened. The
process ends when its stdin does. Started by edgekd.runtime.engine_process.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from edgekd.errors import EdgekdError, EngineError, MissingExtraError, QueueFullError
from edgekd.no_memory import ADVICE, is_out_of_memory
from edgekd.runtime.batch_engine import EngineOptions
from edgekd.runtime.batch_loading import BatchModel, open_batch_model
from edgekd.runtime.grammar import Grammar, GrammarCompiler, Matcher
from edgekd.runtime.messages import (
    Event,
    Failed,
    FailureCode,
    events_to_json,
    request_from_json,
    to_line,
)
from edgekd.runtime.scheduler import Scheduler
from edgekd.runtime.text_calls import LANES, TextCalls

MAX_LINE_BYTES = 16 * 1024 * 1024
"""A line with a prompt of 1,000,000 tokens has 7 MB."""
HEARTBEAT_S = 1.0
MAX_SLOW_CALLS = 48
"""How many chats may wait for their template; the parent lets 64 questions wait in all."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What the process is told first."""

    model: str
    options: EngineOptions
    max_waiting: int
    revision: str | None = None


class _Worker:
    """One scheduler between two pipes."""

    def __init__(self, model: BatchModel, settings: WorkerSettings, out: "_Out") -> None:
        self._model = model
        self._grammars: GrammarCompiler | None = None
        self._scheduler = Scheduler(
            model.engine,
            model.tokenizer,
            max_waiting=settings.max_waiting,
            compile_grammar=self._compile,
        )
        self._out = out
        self._sent_s = 0.0

    def run(self, inbox: "queue.SimpleQueue[bytes]") -> None:
        """Work until an empty line, which stands for the end of the pipe."""
        while True:
            events: list[Event] = []
            for line in _drain(inbox, wait=self._scheduler.is_idle):
                if not line:
                    return
                events += self._handle(json.loads(line))
            events += self._scheduler.step()
            self._send(events)

    def _handle(self, message: dict[str, Any]) -> list[Event]:
        if "cancel" in message:
            return self._scheduler.cancel(message["cancel"])
        request_id = str(message["submit"]["id"])
        try:
            self._scheduler.submit(request_from_json(message["submit"]))
        except EdgekdError as error:
            return [Failed(request_id, _code_of(error), str(error))]
        return []

    def _send(self, events: Sequence[Event]) -> None:
        now_s = time.monotonic()
        if not events and now_s - self._sent_s < HEARTBEAT_S:
            return
        self._sent_s = now_s
        found = self._scheduler.snapshot()
        snapshot = vars(found) | {"counters": vars(found.counters)}  # asdict takes 100 us
        self._out.write({"events": events_to_json(events), "snapshot": snapshot})

    def _compile(self, grammar: Grammar) -> Matcher:
        if self._grammars is None:
            self._grammars = GrammarCompiler(self._model.tokenizer, self._model.engine.vocab_size)
        return self._grammars.compile(grammar)


def main() -> int:
    """Serve until stdin ends; return the exit code."""
    # The parent decides when to stop; a terminal or a service manager signals both.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    out = _Out(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # what libraries print must not get between the lines
    first = json.loads(sys.stdin.buffer.readline(MAX_LINE_BYTES))
    settings = WorkerSettings(**{**first, "options": EngineOptions(**first["options"])})
    try:
        model = open_batch_model(settings.model, settings.options, settings.revision)
    except EdgekdError as error:
        out.write({"fatal": str(error), "kind": type(error).__name__})
        return 1
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        out.write({"fatal": ADVICE, "kind": EngineError.__name__})
        return 1
    out.write({"ready": _describe(model)})
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    lanes = _Lanes(TextCalls(model), out)
    threading.Thread(target=_read, args=(inbox, lanes), daemon=True).start()
    try:
        _Worker(model, settings, out).run(inbox)
    except BrokenPipeError:  # the parent is gone
        os._exit(0)
    return 0


def _describe(model: BatchModel) -> dict[str, Any]:
    engine = model.engine
    return {
        "engine": engine.name,
        "vocab_size": engine.vocab_size,
        "context_tokens": engine.context_tokens,
        "n_slots": engine.n_slots,
    }


class _Out:
    """The pipe to the parent, on which one line is written at a time."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def write(self, message: dict[str, Any]) -> None:
        line = to_line(message)
        with self._lock:
            self._pipe.write(line)
            self._pipe.flush()


class _Lanes:
    """Answers questions about text, beside the engine's steps so that no stream waits for them.

    What may take long has a thread and a queue of its own, shorter than what the parent lets
    wait in all, so that quick questions always find a place.
    """

    def __init__(self, texts: TextCalls, out: _Out) -> None:
        self._texts, self._out = texts, out
        self._queues: dict[str, queue.Queue[dict[str, Any]]] = {}

    def put(self, call: dict[str, Any]) -> None:
        """Answer ``call`` some time soon."""
        lane = LANES.get(call["name"], "")
        if lane not in self._queues:
            self._queues[lane] = queue.Queue(MAX_SLOW_CALLS if lane else 0)
            threading.Thread(target=self._answer, args=(self._queues[lane],), daemon=True).start()
        try:
            self._queues[lane].put_nowait(call)
        except queue.Full:
            error = f"{MAX_SLOW_CALLS} requests wait for this already; try again later"
            kind = QueueFullError.__name__
            self._out.write({"call": call["call"], "error": error, "kind": kind})

    def _answer(self, calls: "queue.Queue[dict[str, Any]]") -> None:
        with suppress(BrokenPipeError):  # the parent is gone
            while True:
                self._out.write(self._texts.answer(calls.get()))


def _read(inbox: "queue.SimpleQueue[bytes]", lanes: _Lanes) -> None:
    """Pass on the lines of stdin; an empty one at the end, or where one is too long."""
    while True:
        line = sys.stdin.buffer.readline(MAX_LINE_BYTES)
        if line.startswith(b'{"call"') and line.endswith(b"\n"):
            lanes.put(json.loads(line))
            continue
        inbox.put(line if line.endswith(b"\n") else b"")
        if not line.endswith(b"\n"):
            return


def _drain(inbox: "queue.SimpleQueue[bytes]", *, wait: bool) -> list[bytes]:
    """Return the lines that are there; where there is nothing else to do, wait for one."""
    lines = [inbox.get()] if wait else []
    while not inbox.empty():
        lines.append(inbox.get())
    return lines


def _code_of(error: EdgekdError) -> FailureCode:
    if isinstance(error, QueueFullError):
        return "queue_full"
    return "engine_error" if isinstance(error, MissingExtraError) else "invalid_request"


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # the parent is gone
        sys.exit(main())
