"""uvicorn's HTTP/1.1 with a time limit for the head of a request.

uvicorn closes a connection that idles between requests, but waits for ever for the first byte,
or for the rest of a head: a client that sends one header a minute keeps a connection for free.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0
"""Time for request line and headers, from the first byte or from the connection."""
MAX_HEAD_BYTES = 16 * 1024


class TimedH11(H11Protocol):
    """One connection; closed where a head is not complete in time."""

    head_s = HEAD_S
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        """Take in ``data``; see whether it completes a head."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._cancel()
        elif self._timer is None:
            self._begin()

    def on_response_complete(self) -> None:
        """Let a next request begin; its head may be half here already."""
        super().on_response_complete()
        if self.conn.trailing_data[0] and self.conn.their_state is h11.IDLE:
            self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._cancel()
        super().connection_lost(exc)

    def _begin(self) -> None:
        self._cancel()
        self._timer = self.loop.call_later(self.head_s, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self.transport.close()

    def _cancel(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
