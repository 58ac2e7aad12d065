"""A program on another machine that ends when the connection does.

Neither ssh without a terminal nor adb ends what it started when the connection is lost: a bench
would go on, and spoil the next one. So a shell there watches its standard input, which is open as
long as the connection is, and then kills its process group. Nothing else is in it: sshd and adbd
give each command a session of its own (setsid).
"""

import shlex
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import IO

from edgekd.errors import DeviceError

_LAST_LINES = 40
_DRAIN_S = 5.0  # an ssh that stays as the master of others may hold a pipe open
_STOP_S = 5.0
# $1 is run when the connection is lost, before the rest is killed; the command follows. The shell
# itself reads: a cat would outlive the guard, and hold the one socket that adbd gives a command for
# both directions, so that adb waited for more output for ever.
_GUARD = """
lost=$1; shift
exec 3<&0 </dev/null
( while read -r line <&3; do :; done; eval "$lost"; kill -9 0 ) >/dev/null 2>&1 &
guard=$!
"$@" 3<&-
code=$?
kill "$guard" 2>/dev/null
exit "$code"
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    errors: tuple[str, ...]
    """The last lines of its standard error."""

    @property
    def last_line(self) -> str:
        """Return the last thing it said that went wrong."""
        return self.errors[-1] if self.errors else f"it ended with exit code {self.code}"


def tied(command: Sequence[str], lost: str = "") -> str:
    """Return one line for a remote shell: run ``command`` and end it with the connection."""
    return shlex.join(["sh", "-c", _GUARD, "sh", lost, *command])


def shell_line(script: str, *arguments: str) -> str:
    """Return one line for a remote shell, of whatever kind: run ``script`` in a plain sh."""
    return shlex.join(["sh", "-c", script, "sh", *arguments])


def run_streaming(command: Sequence[str], say: Callable[[str], None]) -> Ended:
    """Run ``command`` here; ``say`` gets each line of standard error while it runs.

    Its standard input stays open until it ends, or until this process does.

    Raises:
        DeviceError: the program is not installed.
    """
    errors: deque[str] = deque(maxlen=_LAST_LINES)
    output: list[str] = []

    def heard(line: str) -> None:
        if line := line.strip():
            errors.append(line)
            say(line)

    child = _start(command)
    assert child.stdout and child.stderr and child.stdin
    readers = [_reader(child.stdout, output.append), _reader(child.stderr, heard)]
    try:
        child.wait()
    finally:
        _stop(child)
        for reader in readers:
            reader.join(_DRAIN_S)
    return Ended(child.returncode, "".join(output), tuple(errors))


def _start(command: Sequence[str]) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace"
        )
    except FileNotFoundError as error:
        raise DeviceError(
            f"{command[0]} is not installed here; on Debian: "
            f"sudo apt-get install {'adb' if command[0] == 'adb' else 'openssh-client'}"
        ) from error


def _reader(stream: IO[str], take: Callable[[str], None]) -> Thread:
    def read() -> None:
        with stream:
            for line in stream:
                take(line)

    thread = Thread(target=read, daemon=True)
    thread.start()
    return thread


def _stop(child: "subprocess.Popen[str]") -> None:
    assert child.stdin
    with suppress(BrokenPipeError):
        child.stdin.close()
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
