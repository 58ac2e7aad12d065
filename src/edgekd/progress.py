"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from edgekd.units import format_duration

if TYPE_CHECKING:
    from rich.console import Console

_LINE_INTERVAL_S = 5.0

Advance = Callable[[int, str], None]
"""Takes how much is done now, and a note such as the loss."""


class Progress(Protocol):
    """Where long work says how far it is."""

    def say(self, line: str) -> None:
        """Say one thing that happened."""

    def track(self, name: str, total: int, start: int = 0) -> AbstractContextManager[Advance]:
        """Follow ``name`` up to ``total``; ``start`` was done by an earlier run."""


class Silence:
    """Says nothing: for ``--quiet``, and for callers who did not ask."""

    def say(self, line: str) -> None:
        """Say nothing."""

    @contextmanager
    def track(self, name: str, total: int, start: int = 0) -> Iterator[Advance]:
        """Follow nothing."""
        yield lambda done, note: None


class Lines:
    """Plain lines, for logs: one every few seconds, and always the last."""

    def __init__(self, stream: TextIO | None = None, interval_s: float = _LINE_INTERVAL_S) -> None:
        """Write to ``stream`` (standard error), at most one line in ``interval_s``."""
        self._stream = stream or sys.stderr
        self._interval_s = interval_s

    def say(self, line: str) -> None:
        """Write ``line``."""
        print(line, file=self._stream, flush=True)

    @contextmanager
    def track(self, name: str, total: int, start: int = 0) -> Iterator[Advance]:
        """Write how far ``name`` is, its rate and the time left."""
        start_s = time.monotonic()
        said_s = -self._interval_s

        def advance(done: int, note: str) -> None:
            nonlocal said_s
            elapsed_s = time.monotonic() - start_s
            if done < total and elapsed_s - said_s < self._interval_s:
                return
            said_s = elapsed_s
            left_s = elapsed_s / max(1, done - start) * (total - done)
            parts = [f"{name} {done}/{total}", note, f"{format_duration(left_s)} left"]
            self.say("  ".join(part for part in parts if part))

        yield advance


class Bar:
    """A live bar on a terminal."""

    def __init__(self, console: "Console") -> None:
        """Draw on ``console``."""
        self._console = console

    def say(self, line: str) -> None:
        """Write ``line`` above the bar."""
        self._console.print(line, markup=False, highlight=False)

    @contextmanager
    def track(self, name: str, total: int, start: int = 0) -> Iterator[Advance]:
        """Draw a bar for ``name`` with its rate and the time left."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        with RichProgress(*columns, console=self._console) as live:
            task = live.add_task(name, total=total, completed=start, note="")

            def advance(done: int, note: str) -> None:
                live.update(task, completed=done, note=note)

            yield advance


def make_progress(quiet: bool) -> Progress:
    """Return the form that fits standard error."""
    if quiet:
        return Silence()
    if not sys.stderr.isatty():
        return Lines()
    from rich.console import Console

    console = Console(stderr=True)
    return Lines() if console.is_dumb_terminal else Bar(console)
