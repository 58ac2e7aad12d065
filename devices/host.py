"""Where facts about a machine come from: its files and its commands, both replaceable.

Every reader in this part takes a ``Host``. The live one reads below ``/`` and starts programs;
a test gives a folder with a device's files and the replies its commands gave, so that a whole
machine is replayed. With another root no program of the machine we run on is ever asked.
"""

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

LIVE_ROOT = Path("/")
_TIMEOUT_S = 10
_NOT_FOUND = 127  # as a shell says it


@dataclass(frozen=True)
class Reply:
    """What a command answered."""

    code: int
    text: str
    """Standard output; on failure standard error where that is all there is."""

    @property
    def is_good(self) -> bool:
        """Whether the command succeeded and said something."""
        return bool(self.output)

    @property
    def output(self) -> str:
        """What a command that succeeded said, stripped; nothing of one that failed."""
        return self.text.strip() if self.code == 0 else ""


Runner = Callable[[Sequence[str]], Reply]


@dataclass(frozen=True)
class Host:
    """One machine: a folder that holds its files and a function that runs its commands."""

    root: Path
    run: Runner

    @classmethod
    def at(cls, root: Path = LIVE_ROOT, run: Runner | None = None) -> Self:
        """Return the machine below ``root``; commands run only where it is the live one."""
        return cls(root, run or (run_command if root == LIVE_ROOT else run_nothing))

    def text(self, path: str) -> str | None:
        """Return the stripped text of the file ``path``; None where it cannot be read."""
        return read_text(self.root / path)

    def number(self, path: str) -> int | None:
        """Return the whole number that the file ``path`` holds; None where it holds none."""
        return parse_int(self.text(path))

    def folders(self, pattern: str) -> list[str]:
        """Return the folders that match ``pattern``, in the order of the numbers in their names."""
        found = [path for path in self.root.glob(pattern) if path.is_dir()]
        return [str(path.relative_to(self.root)) for path in sorted(found, key=_natural)]


def read_text(file: Path) -> str | None:
    """Return the stripped text of ``file``; None where it cannot be read or is empty."""
    try:
        # Device-tree strings end in a NUL.
        return file.read_text("utf-8", errors="replace").strip("\0 \t\n") or None
    except OSError:
        return None


def parse_int(text: str | None) -> int | None:
    """Return ``text`` as a whole number, in whose place sysfs may also say nonsense."""
    try:
        return int(text) if text else None
    except ValueError:
        return None


def run_command(command: Sequence[str]) -> Reply:
    """Run ``command`` in plain English; a missing one is code 127, a late one what it said."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout or ""
        return Reply(124, said.decode("utf-8", "replace") if isinstance(said, bytes) else said)
    except (OSError, UnicodeDecodeError) as error:
        return Reply(_NOT_FOUND, str(error))
    return Reply(done.returncode, done.stdout or done.stderr)


def run_nothing(command: Sequence[str]) -> Reply:
    """Answer as a machine that has none of the programs."""
    return Reply(_NOT_FOUND, f"{command[0]}: not found")


def replay(replies: Mapping[str, str]) -> Runner:
    """Return a runner that answers from ``replies``, by the words of the command."""

    def run(command: Sequence[str]) -> Reply:
        text = replies.get(" ".join(command))
        return run_nothing(command) if text is None else Reply(0, text)

    return run


def _natural(path: Path) -> tuple[str, int, str]:
    digits = "".join(char for char in path.name if char.isdigit())
    stem = path.name.rstrip("0123456789")
    return str(path.parent), int(digits) if digits and stem != path.name else -1, path.name
