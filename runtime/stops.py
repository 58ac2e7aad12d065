"""Tokens in, text out that is certain: whole characters, up to the first stop string.

A character leaves with its last byte, and what may be the beginning of a stop string once it
turns out not to be one. Nothing else is held back.
"""

import codecs
from collections.abc import Sequence

from edgekd.runtime.tokenizer import Tokenizer


class StopFilter:
    """Lets text through up to the stop string that is complete first, however it is cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Look out for ``stops``."""
        self.matched: str | None = None
        """The stop string that ended the text."""
        self._stops = tuple(stops)
        self._held = ""

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was complete."""
        return self.matched is not None

    def feed(self, text: str) -> str:
        """Return what is certain to come before a stop string, now that ``text`` is known."""
        if self.is_stopped:
            return ""
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stops]
        # What is complete first wins; of those that end together, the longest.
        matches = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if matches:
            _, start, self.matched = min(matches)
            return self._release(start)
        return self._release(len(self._held) - self._undecided())

    def flush(self) -> str:
        """Return what was held back; call it when no more text will come."""
        return "" if self.is_stopped else self._release(len(self._held))

    def _release(self, n_chars: int) -> str:
        released, self._held = self._held[:n_chars], self._held[n_chars:]
        return released

    def _undecided(self) -> int:
        """Return the length of the longest end of the held text that may begin a stop string."""
        longest = max(map(len, self._stops), default=0) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class TextOut:
    """Token ids in, certain text out."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        """Begin a text that ``stops`` end."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._filter = StopFilter(stops)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._filter.is_stopped

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._filter.matched

    def add(self, token_id: int) -> str:
        """Return the text that becomes certain with ``token_id``."""
        return self._filter.feed(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def end(self) -> str:
        """Return the rest, when no more tokens will come."""
        return self._filter.feed(self._decoder.decode(b"", final=True)) + self._filter.flush()
