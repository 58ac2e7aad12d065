"""One engine process and its two pipes, seen from the parent."""

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from edgekd.runtime.engine_worker import MAX_LINE_BYTES, WorkerSettings
from edgekd.runtime.messages import to_line

STOP_S = 5.0
"""Time for a child to end by itself."""


class Child:
    """One process, and a thread that writes to it so that nobody waits for a full pipe."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Start it."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edgekd.runtime.engine_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._heard_s = time.monotonic()
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()
        self.send(to_line(asdict(settings)))

    def send(self, line: bytes) -> None:
        """Write ``line`` some time soon; an empty one ends the pipe."""
        self._outbox.put(line)

    def silent_s(self) -> float:
        """Return for how long nothing was heard."""
        return time.monotonic() - self._heard_s

    def resident_bytes(self) -> int | None:
        """Return its resident memory, pages of a mapped model included; None where it ended."""
        import psutil

        try:
            return int(psutil.Process(self.process.pid).memory_info().rss)
        except psutil.Error:
            return None

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield what the process says, until it ends or breaks the rules."""
        assert self.process.stdout
        while (line := self.process.stdout.readline(MAX_LINE_BYTES)).endswith(b"\n"):
            self._heard_s = time.monotonic()
            yield json.loads(line)

    def end(self) -> None:
        """End the process if it has not ended, kindly first."""
        self.send(b"")
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def clean_up(self) -> str:
        """End the process and free its pipes; return how it ended. For the reading thread."""
        self.end()
        self._writer.join()
        assert self.process.stdout
        self.process.stdout.close()
        code = self.process.returncode
        return f"exit code {code}" if code >= 0 else _signal_name(-code)

    def _write(self) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError), self.process.stdin:
            while line := self._outbox.get():
                self.process.stdin.write(line)
                self.process.stdin.flush()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
