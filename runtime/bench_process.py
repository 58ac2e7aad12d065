"""The parent's side of a measuring process: it asks, and reads one reply."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import Any, Self

from edgekd.errors import EngineError
from edgekd.runtime.bench_settings import BenchSettings

_WORKER = "edgekd.runtime.bench_worker"


class MeasuringProcess:
    """A fresh process that does one thing after another for a model."""

    def __init__(self, model: str) -> None:
        """Start the process; errors will name ``model``."""
        self.model = model
        # A file, since nobody reads a pipe while the model is measured; closed by close().
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.spawned_s = time.monotonic()
        # -P: a statistics.py in the current folder must not replace the one of the library.
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )

    def ask(self, what: str, **values: Any) -> dict[str, Any]:
        """Return the reply to one command.

        Raises:
            EngineError: the command failed, or the process ended.
        """
        assert self._child.stdin and self._child.stdout
        try:
            print(json.dumps({"do": what, **values}), file=self._child.stdin, flush=True)
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        reply: dict[str, Any] = json.loads(line) if line.endswith("\n") else {}
        reason = reply.get("error") if reply else self._describe_end()
        if reason is not None:
            raise EngineError(reason if self.model in reason else f"{self.model}: {reason}")
        return reply

    def close(self) -> None:
        """End the process and wait for it."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        self._child.wait()
        self._errors.close()

    def __enter__(self) -> Self:
        """Return the process itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """End the process."""
        self.close()

    def _describe_end(self) -> str:
        code = self._child.wait()
        self._errors.seek(0)
        return describe_end(code, self._errors.read())


class BenchProcess(MeasuringProcess):
    """One model in a fresh process of its own."""

    def __init__(
        self, model: str, settings: BenchSettings, *, cold: bool = False, extra_work: float = 0.0
    ) -> None:
        """Start the process and load ``model``.

        Raises:
            EngineError: it cannot be loaded; the reason is the one of its process.
        """
        super().__init__(model)
        try:
            self.facts = self.ask(
                "load",
                model=model,
                settings=settings.as_dict(),
                cold=cold,
                spawned_s=self.spawned_s,
                extra_work=extra_work,
            )
        except BaseException:
            self.close()
            raise


def describe_end(code: int, errors: str) -> str:
    """Return how a process ended without an answer: its exit code or the signal that killed it."""
    last = (errors.strip().splitlines() or ["it said nothing"])[-1]
    if code >= 0:
        return f"its process ended with exit code {code}: {last}"
    known = {entry.value: entry.name for entry in signal.Signals}
    hint = "; the system may have run out of memory" if known.get(-code) == "SIGKILL" else ""
    return f"its process was killed by {known.get(-code, f'signal {-code}')}{hint}: {last}"
