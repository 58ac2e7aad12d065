"""uvicorn's HTTP/1.1 with a time limit for the head of a request, and for a body nobody needs.

uvicorn closes a connection that idles between requests, but waits for ever for the first byte,
for the rest of a head, or for the rest of a body whose request is answered (refused) already: a
client that sends one byte a second keeps a connection for free.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0
"""Time for request line and headers, from the first byte or from the connection."""
REST_S = 5.0
"""Time for the rest of a body after the answer: who is cut off while sending may not see it."""
MAX_HEAD_BYTES = 16 * 1024


class TimedH11(H11Protocol):
    """One connection; closed where a head, or the rest of a body, is not here in time."""

    head_s = HEAD_S
    rest_s = REST_S
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._begin(self.head_s)

    def data_received(self, data: bytes) -> None:
        """Take in ``data``; see whether it completes a head."""
        super().data_received(data)
        if self._is_answered_early():
            return  # the time for the rest of the body runs on, whatever came
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._cancel()
        elif self._timer is None:
            self._begin(self.head_s)

    def on_response_complete(self) -> None:
        """Let a next request begin; its head may be half here already."""
        super().on_response_complete()
        if self._is_answered_early():
            self._begin(self.rest_s)
        elif self.conn.trailing_data[0] and self.conn.their_state is h11.IDLE:
            self._begin(self.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._cancel()
        super().connection_lost(exc)

    def _is_answered_early(self) -> bool:
        """Return whether the request has its answer while its body still comes."""
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def _begin(self, limit_s: float) -> None:
        self._cancel()
        self._timer = self.loop.call_later(limit_s, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self.transport.close()

    def _cancel(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
