"""Turns on the engine: one request at a time, in the order of arrival, each of them cancellable."""

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from edgekd.errors import EngineError
from edgekd.runtime.generate import Piece, generate
from edgekd.runtime.loading import LoadedModel
from edgekd.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from fastapi import Request

    from edgekd.runtime.openai_api import ApiError

MAX_WAITING = 32


class Job:
    """One request's way through the engine; cancelling it takes effect within one token."""

    def __init__(self, loaded: LoadedModel, prompt_ids: list[int], params: SamplingParams) -> None:
        """Wait for a turn to continue ``prompt_ids``; called on the event loop."""
        self.n_prompt = len(prompt_ids)
        self.future: Future[None] | None = None
        self._work = (loaded, prompt_ids, params)
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._is_cancelled = threading.Event()
        self._watcher: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Generate, on the engine's thread."""
        try:
            with closing(generate(*self._work)) as pieces:
                for piece in pieces:
                    if self._is_cancelled.is_set():
                        return
                    self._put(piece)
        except Exception as error:  # whatever it is, the request must hear of it
            self._put(error)

    async def next(self) -> Piece:
        """Return the next piece, or raise what the engine raised."""
        found = await self._arrived.get()
        if isinstance(found, Exception):
            raise found
        return found

    def watch(self, request: "Request") -> None:
        """Cancel the job when the client goes."""

        async def wait_for_disconnect() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.cancel()

        self._watcher = asyncio.create_task(wait_for_disconnect())

    def cancel(self) -> None:
        """Give the turn to the next one; harmless after the end."""
        self._is_cancelled.set()
        if self.future:
            self.future.cancel()
        self._arrived.put_nowait(EngineError("the request was cancelled"))

    def close(self) -> None:
        """End the job, finished or not."""
        if self._watcher:
            self._watcher.cancel()
        self.cancel()

    def _put(self, found: Piece | Exception) -> None:
        with suppress(RuntimeError):  # the server was stopped, and its event loop with it
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, found)


class Turns:
    """The engine's only thread: its queue is the lock, and keeps the order of arrival."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Start the thread; nothing else may touch the engine of ``loaded`` from now on."""
        self.loaded = loaded
        self._thread = ThreadPoolExecutor(1, "edgekd-engine")
        self._jobs: list[Job] = []

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> Job:
        """Return a new job at the end of the queue.

        Raises:
            ApiError: the queue is full.
        """
        self._jobs = [job for job in self._jobs if job.future and not job.future.done()]
        if len(self._jobs) > MAX_WAITING:  # one of them has its turn
            raise _queue_full()
        job = Job(self.loaded, prompt_ids, params)
        job.future = self._thread.submit(job.run)
        self._jobs.append(job)
        return job

    def close(self) -> None:
        """Cancel every job and end the thread."""
        for job in self._jobs:
            job.close()
        self._thread.shutdown()


def _queue_full() -> "ApiError":
    from edgekd.runtime.openai_api import ApiError

    return ApiError(
        429,
        f"{MAX_WAITING} requests are waiting already; try again later",
        code="queue_full",
        type="rate_limit_error",
        headers={"Retry-After": "5"},
    )
