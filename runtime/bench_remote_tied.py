"""A program on another machine that ends when the connection does.

Neither ssh without a terminal nor adb ends what it started when the connection is lost: a bench
would go on, and spoil the next one. So a shell there watches its standard input, which is open as
long as the connection is, and then kills its process group. Nothing else is in it: sshd and adbd
give each command a session of its own (setsid).

What it answers is not trusted: its size is limited, and no character in it steers a terminal.
"""

import re
import shlex
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import IO

from edgekd.errors import DeviceError
from edgekd.units import format_bytes

_LAST_LINES = 40
_DRAIN_S = 5.0  # an ssh that stays as the master of others may hold a pipe open
_STOP_S = 5.0
MAX_OUTPUT_CHARS = 64 << 20
"""A document with the gaps of a million tokens has 20 MB."""
_MAX_LINE_CHARS = 2000
_CHUNK_CHARS = 1 << 16
# Control characters but tab and newline, and those that turn the direction of what follows.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
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


def clean(text: str) -> str:
    """Return ``text`` without what would steer a terminal that shows it."""
    return _STEERING.sub("\ufffd", text)


def unsaid(line: str) -> None:
    """Say nothing: the last lines are in ``Ended`` if they are needed."""


def run_streaming(
    command: Sequence[str],
    say: Callable[[str], None] = unsaid,
    timeout_s: float | None = None,
) -> Ended:
    """Run ``command`` here; ``say`` gets each line of standard error while it runs.

    Its standard input stays open until it ends, or until this process does.

    Raises:
        DeviceError: the program is not installed, or gives more than ``MAX_OUTPUT_CHARS``.
    """
    errors: deque[str] = deque(maxlen=_LAST_LINES)
    output: list[str] = []
    n_chars = 0

    def heard(line: str) -> None:
        if line := clean(line.strip()):
            errors.append(line)
            say(line)

    def took(text: str) -> None:
        nonlocal n_chars
        n_chars += len(text)
        if n_chars > MAX_OUTPUT_CHARS:
            child.kill()
        else:
            output.append(text)

    child = _start(command)
    assert child.stdout and child.stderr and child.stdin
    stdout, stderr = child.stdout, child.stderr
    readers = [
        _reader(stdout, lambda: stdout.read(_CHUNK_CHARS), took),
        _reader(stderr, lambda: stderr.readline(_MAX_LINE_CHARS), heard),
    ]
    try:
        child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        errors.append(f"no answer within {timeout_s} s")
    finally:
        _stop(child)
        for reader in readers:
            reader.join(_DRAIN_S)
    if n_chars > MAX_OUTPUT_CHARS:
        raise DeviceError(
            f"{command[0]} gave more than {format_bytes(MAX_OUTPUT_CHARS)}, which no bench does; "
            "look at what runs there"
        )
    return Ended(child.returncode, clean("".join(output)), tuple(errors))


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


def _reader(stream: IO[str], read: Callable[[], str], take: Callable[[str], None]) -> Thread:
    """Start to give ``take`` what ``read`` finds in ``stream`` until it ends."""

    def read_all() -> None:
        with stream:
            for text in iter(read, ""):
                take(text)

    thread = Thread(target=read_all, daemon=True)
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
