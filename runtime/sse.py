"""Server-sent events, and bodies that come whole or as a stream of them."""

import json
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING, Any, Protocol

from edgekd.runtime.api_errors import as_api_error
from edgekd.runtime.texts import Run

if TYPE_CHECKING:
    from fastapi import Response

_log = logging.getLogger("uvicorn.error")

DONE = "data: [DONE]\n\n"


def event(part: Any) -> str:
    """Return ``part`` as one event."""
    return f"data: {json.dumps(part, ensure_ascii=False)}\n\n"


class Reply(Protocol):
    """What one request is answered with, once its texts are made."""

    async def whole(self, run: Run) -> Any:
        """Return the answer in one piece."""

    def parts(self, run: Run) -> AsyncIterator[str]:
        """Yield the answer as server-sent events."""


async def answer(
    running: AbstractAsyncContextManager[Run], reply: Reply, *, streamed: bool
) -> "Response":
    """Return ``reply``; what fails before the first part of a stream has a status of its own."""
    from fastapi.responses import JSONResponse, StreamingResponse

    if not streamed:
        async with running as run:
            return JSONResponse(await reply.whole(run))
    async with AsyncExitStack() as stack:
        run = await stack.enter_async_context(running)
        await run.begin()
        kept = stack.pop_all()  # the stream outlives this function, and closes the run itself
    return StreamingResponse(_guarded(kept, reply.parts(run)), media_type="text/event-stream")


async def _guarded(stack: AsyncExitStack, parts: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield ``parts``; where the engine fails midway, the error is the last of them."""
    async with stack:
        try:
            async for part in parts:
                yield part
        except Exception as error:
            told = as_api_error(error)
            log = _log.exception if told.body["error"]["code"] == "internal_error" else _log.warning
            log("a stream ended early: %s", error)
            yield event(told.body)
