"""The test's side of zygote.py: a job in, an outcome out."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What came of a command."""

    code: int
    """Exit code; negative for a signal."""
    killed: bool
    seconds: float
    stdout: str
    stderr: str
    before: dict[str, str]
    """Hash of every file in the place, beforehand."""
    after: dict[str, str]
    orphans: list[str] = field(default_factory=list)
    """Commands that it started and that outlived it."""


class NotPossibleError(Exception):
    """The fault cannot be caused on this machine."""


class Zygote:
    """The process that forks commands."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        """Take ``process`` when it has said that it is ready."""
        self._process = process

    def run(self, argv: list[str], place: Path, scratch: Path, **more: Any) -> Outcome:
        """Return what comes of ``edgekd argv`` in the folder ``place``; ``scratch`` is empty.

        Raises:
            NotPossibleError: the fault in ``more`` cannot be caused here.
        """
        assert self._process.stdin and self._process.stdout
        job = {"argv": argv, "place": str(place), "scratch": str(scratch)} | more
        print(json.dumps(job), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        if "skipped" in answer:
            raise NotPossibleError(answer["skipped"])
        assert "broken" not in answer, answer
        return Outcome(**answer)


@contextmanager
def zygote() -> Iterator[Zygote]:
    """Yield one that is ready."""
    # Threads of OpenMP do not live through a fork. A coverage run would write into full disks.
    environment = {key: value for key, value in os.environ.items() if "COVERAGE" not in key}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "src"), str(root)])
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("zygote.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "ready\n"
        yield Zygote(process)
        process.stdin.close()
