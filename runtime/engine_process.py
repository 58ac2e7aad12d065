"""An engine in a child process, restarted when it dies; requests in, events out.

A request that was running when the child died gets a ``Failed`` event and is never repeated
behind the client's back. Events reach the caller on this module's reader thread.

Example::

    with EngineProcess(WorkerSettings(model="m.gguf", options=EngineOptions(), max_waiting=8)) as e:
        for event in e.stream(request): ...
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, Literal

from edgekd import errors
from edgekd.errors import EdgekdError, EngineError, EngineUnavailableError, QueueFullError
from edgekd.runtime.engine_child import Child
from edgekd.runtime.engine_worker import MAX_LINE_BYTES, WorkerSettings
from edgekd.runtime.messages import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Token,
    events_from_json,
    request_to_json,
    to_line,
)
from edgekd.runtime.scheduler import Counters, Snapshot

State = Literal["loading", "ready", "restarting", "stopped"]
Deliver = Callable[[Event], None]

HANG_S = 300.0
"""Silence after which a busy child is taken for hung; a step on a small device takes seconds."""
MAX_PAUSE_S = 30.0
MAX_CALLS = 64
"""Texts that may wait for the tokenizer."""
_MAX_STARTS = 4  # of a child that never was ready, until it is given up
_PROVEN_S = 1.0  # a child that was ready for so long, or made text, is replaced at once

_log = logging.getLogger("edgekd.engine")


@dataclass(frozen=True)
class EngineInfo:
    """What the child says of its engine."""

    engine: str
    vocab_size: int
    context_tokens: int
    n_slots: int


class EngineProcess:
    """The parent's side: one child at a time, and the requests that it works on."""

    def __init__(self, settings: WorkerSettings, *, hang_s: float = HANG_S) -> None:
        """Start a child that opens the model; see ``wait_ready``."""
        self.state: State = "loading"
        self.restarts = 0
        """How many children died and were replaced."""
        self.info: EngineInfo | None = None
        self.snapshot: Snapshot | None = None
        """What the child said last; up to a second old while it is busy, older while idle."""
        self._settings = settings
        self._hang_s = hang_s
        self._lock = threading.Lock()
        self._requests: dict[str, Deliver] = {}
        self._calls: dict[int, Future[Any]] = {}
        self._call_numbers = count()
        self._changed = threading.Condition(self._lock)
        self._fatal: EdgekdError | None = None
        self._child: Child | None = None
        self._is_proven = False  # the child has made text
        self._ready_since_s: float | None = None
        self._supervisor = threading.Thread(target=self._supervise, name="edgekd-engine")
        self._supervisor.start()

    def __enter__(self) -> "EngineProcess":
        """Return when the engine is ready."""
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the child."""
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the child, where there is one."""
        child = self._child
        return child.process.pid if child else None

    @property
    def n_requests(self) -> int:
        """How many requests are waiting or running."""
        return len(self._requests)

    @property
    def resident_bytes(self) -> int | None:
        """How much memory the child has; None while there is none."""
        child = self._child
        return child.resident_bytes() if child else None

    @property
    def max_requests(self) -> int:
        """How many requests may wait or run at once."""
        n_slots = self.info.n_slots if self.info else 0
        return n_slots + self._settings.max_waiting

    def wait_ready(self, timeout_s: float | None = None) -> EngineInfo:
        """Return what the engine is, once it can take requests.

        Raises:
            EdgekdError: the model cannot be opened; of the class that the child raised.
            EngineUnavailableError: it took longer than ``timeout_s``, or was closed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.state in ("ready", "stopped") or self._fatal, timeout_s
            )
            if self._fatal:
                raise self._fatal
            if self.state != "ready" or self.info is None:
                raise EngineUnavailableError(f"the engine is {self.state}; try again later")
            return self.info

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Hand over ``request``; ``deliver`` gets its events, on another thread.

        Raises:
            EngineUnavailableError: the engine is loading, restarting or stopped.
            QueueFullError: too many requests wait already.
        """
        line = to_line({"submit": request_to_json(request)})
        if len(line) > MAX_LINE_BYTES:
            raise EngineError(f"a request of {len(line)} bytes is too long; shorten the prompt")
        with self._lock:
            child = self._ready_child()
            assert self.info
            most = self.max_requests
            if len(self._requests) >= most:
                raise QueueFullError(
                    f"{most} requests are running or waiting already; try again later"
                )
            assert request.id not in self._requests, "request ids must be unique"
            self._requests[request.id] = deliver
            child.send(line)

    def cancel(self, request_id: str) -> None:
        """End a request early; its last event says so. Harmless after its end."""
        with self._lock:
            if request_id in self._requests and self._child:
                self._child.send(to_line({"cancel": request_id}))

    def stream(self, request: GenerationRequest) -> Generator[Event, None, None]:
        """Yield the events of ``request`` to its end; closing the iterator cancels it.

        Raises:
            EngineUnavailableError: the engine is loading, restarting or stopped.
            QueueFullError: too many requests wait already.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                yield event
                if isinstance(event, Finished | Failed):
                    return
        finally:
            self.cancel(request.id)

    def call(self, name: str, **arguments: Any) -> "Future[Any]":
        """Return what the child answers to a question about text; see edgekd.runtime.text_calls.

        Its errors come with the future: those of the question, and EngineUnavailableError where
        the child ends before it answers.

        Raises:
            EngineUnavailableError: the engine is loading, restarting or stopped.
            QueueFullError: too many questions wait already.
        """
        with self._lock:
            number = next(self._call_numbers)
            line = to_line({"call": number, "name": name, "arguments": arguments})
            if len(line) > MAX_LINE_BYTES:
                raise EngineError(f"a text of {len(line)} bytes is too long; shorten it")
            child = self._ready_child()
            if len(self._calls) >= MAX_CALLS:
                raise QueueFullError(f"{MAX_CALLS} texts wait for the tokenizer; try again later")
            future: Future[Any] = Future()
            self._calls[number] = future
            child.send(line)
        return future

    def wait_idle(self, timeout_s: float) -> bool:
        """Return whether every request ended within ``timeout_s``, for a graceful stop."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._requests, timeout_s)

    def close(self) -> None:
        """End the child; requests that are left fail."""
        with self._changed:
            self.state = "stopped"
            self._changed.notify_all()
            child = self._child
        if child:
            child.end()
        self._supervisor.join()

    def _ready_child(self) -> Child:
        if self.state != "ready" or self._child is None:
            raise EngineUnavailableError(f"the engine is {self.state}; try again in a few seconds")
        return self._child

    def _supervise(self) -> None:
        """Keep a child running until closed."""
        n_early_deaths = 0
        while self.state != "stopped":
            cause = self._live_once()
            n_early_deaths = 0 if self._could_live() else n_early_deaths + 1
            if n_early_deaths >= _MAX_STARTS and self.info is None:
                self._fatal = self._fatal or EngineError(
                    f"the engine process ended {n_early_deaths} times before it had opened the "
                    f"model, at last so: {cause}; is there enough memory for it?"
                )
            if not self._bury(cause):
                return
            self._pause(0 if n_early_deaths < 2 else 2.0 ** (n_early_deaths - 2))

    def _live_once(self) -> str:
        """Run one child to its end and return how it ended."""
        child = None
        try:
            with self._lock:
                self._is_proven, self._ready_since_s = False, None
                if self.state == "stopped":
                    return "stopped"
                self._child = child = Child(self._settings)
            self._follow(child)
        except (MemoryError, OSError, RuntimeError) as error:  # no room for a process or a thread
            if child is None:
                return f"it cannot be started: {error!r}"
            child.process.kill()
        return child.clean_up()

    def _could_live(self) -> bool:
        """Return whether the child that ended had worked, so that the next one will too."""
        since_s = self._ready_since_s
        return self._is_proven or (since_s is not None and time.monotonic() - since_s > _PROVEN_S)

    def _follow(self, child: Child) -> None:
        """Pass on what ``child`` says until it ends or is taken for hung."""
        watch = threading.Thread(target=self._watch, args=(child,), daemon=True)
        watch.start()
        for message in child.messages():
            try:
                self._take(message)
            except Exception:  # a child that talks nonsense is replaced
                _log.exception("the engine process sent what cannot be understood")
                break

    def _take(self, message: dict[str, Any]) -> None:
        if "fatal" in message:
            with self._changed:
                self._fatal = _error_of(message["kind"], message["fatal"])
                self._changed.notify_all()
        elif "ready" in message:
            with self._changed:
                self.info = EngineInfo(**message["ready"])
                self._ready_since_s = time.monotonic()
                if self.state != "stopped":
                    self.state = "ready"
                self._fatal = None
                self._changed.notify_all()
        elif "call" in message:
            with self._lock:
                future = self._calls.pop(message["call"])
            if not future.set_running_or_notify_cancel():
                return  # who asked has gone
            if "error" in message:
                future.set_exception(_error_of(message["kind"], message["error"]))
            else:
                future.set_result(message["value"])
        else:
            self.snapshot = _snapshot_from(message["snapshot"])
            for event in events_from_json(message["events"]):
                self._dispatch(event)

    def _dispatch(self, event: Event) -> None:
        """Give ``event`` to the one who asked; nobody does any more after a client left."""
        with self._changed:
            self._is_proven |= isinstance(event, Token | Finished)
            if isinstance(event, Finished | Failed):
                deliver = self._requests.pop(event.id, None)
                self._changed.notify_all()
            else:
                deliver = self._requests.get(event.id)
        if deliver:
            _deliver(deliver, event)

    def _bury(self, cause: str) -> bool:
        """Tell every request that the child is gone; return whether to start another one."""
        with self._changed:
            orphans, self._requests = self._requests, {}
            calls, self._calls = self._calls, {}
            goes_on = self.state != "stopped" and (self._fatal is None or self.info is not None)
            if self.state != "stopped":
                self.state = "restarting" if goes_on else "stopped"
            self.restarts += goes_on
            self._child = None
            self._changed.notify_all()
        if goes_on:
            _log.warning("the engine process ended (%s); starting another one", cause)
        for future in calls.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineUnavailableError(f"the engine process ended ({cause})"))
        for request_id, deliver in orphans.items():
            message = f"the engine process ended ({cause}) while it worked on this; try again"
            _deliver(deliver, Failed(request_id, "engine_died", message))
        return goes_on

    def _pause(self, pause_s: float) -> None:
        """Wait before the next start, so that a child that cannot live is no busy loop."""
        with self._changed:
            self._changed.wait_for(lambda: self.state == "stopped", min(pause_s, MAX_PAUSE_S))

    def _watch(self, child: Child) -> None:
        """Kill ``child`` if it is silent too long while it has work."""
        while child.process.poll() is None:
            time.sleep(min(1.0, self._hang_s / 4))
            is_busy = self.state == "ready" and self._requests
            if is_busy and child.silent_s() > self._hang_s:
                _log.warning("the engine process is silent for %.0f s; killing it", self._hang_s)
                child.process.kill()


def _deliver(deliver: Deliver, event: Event) -> None:
    try:
        deliver(event)
    except Exception:  # one caller's fault must not end the others' streams
        _log.exception("an event could not be delivered")


def _snapshot_from(found: dict[str, Any]) -> Snapshot:
    return Snapshot(
        n_waiting=found["n_waiting"],
        n_running=found["n_running"],
        slot_tokens=tuple(found["slot_tokens"]),
        slot_requests=tuple(found["slot_requests"]),
        counters=Counters(**found["counters"]),
    )


def _error_of(kind: str, message: str) -> EdgekdError:
    """Return the error that the child raised, as one of ours."""
    found = getattr(errors, kind, EngineError)
    is_ours = isinstance(found, type) and issubclass(found, EdgekdError)
    if not is_ours or found is errors.MissingExtraError:  # which takes other arguments
        return EdgekdError(message)
    return found(message)
