"""Stages of a long benchmark: each one's result lies on the disk and is taken from there again.

A stage is a name and a function that returns JSON values. When it has ended, its marker
``WORK/stages/NAME.json`` appears whole; a run that was killed, by whatever, does the stage that was
running again and none before it. Under ``accelerate launch`` every process runs the same script:
what is done ``alone`` is done by rank 0 while the others wait for its marker, so WORK must be one
folder for all machines; what is done ``together`` is a command that every process starts.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgekd.files import write_text_atomic

Json = dict[str, Any]
Runner = Callable[[Sequence[str], Mapping[str, str], Path], tuple[int, str]]
"""Runs edgekd's command line: arguments, environment, file for stderr; exit code and stdout."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_S = 0.2
# What torchrun and accelerate tell their processes; a command of one process must not see it.
_LAUNCHED = (
    "RANK",
    "LOCAL_",
    "WORLD_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "ACCELERATE_",
)


def die_with_parent() -> None:
    """Have Linux end this process when its parent ends, so that nothing works on after a kill."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run_as_process(
    arguments: Sequence[str], environment: Mapping[str, str], log: Path
) -> tuple[int, str]:
    """Return exit code and stdout of ``edgekd arguments``; stderr goes to the end of ``log``."""
    with open(log, "ab") as errors:
        done = subprocess.run(
            [sys.executable, "-m", "edgekd", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=dict(environment),
            preexec_fn=die_with_parent,
            check=False,
        )
    return done.returncode, done.stdout.decode("utf-8", "replace")


class Stages:
    """The stages of one run in its folder."""

    def __init__(self, work: Path, settings: Json, run: Runner = run_as_process) -> None:
        """Take the folder up again, or begin in it; ``settings`` must be those it was begun with.

        Exits with a message where they are not.
        """
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._run = run
        self._work = work
        self._n_together = 0
        (work / "stages").mkdir(parents=True, exist_ok=True)
        self.alone("settings", lambda: settings)
        if (begun := self.results()["settings"]) != settings:
            changed = [name for name in settings if settings[name] != begun.get(name)]
            sys.exit(
                f"{work} was begun with another {', '.join(changed)}; give those of "
                f"{work / 'stages' / 'settings.json'}, or another --work"
            )

    def alone(self, name: str, make: Callable[[], Json]) -> Json:
        """Return the result of the stage ``name``; rank 0 makes it where there is none."""
        marker = self._marker(name)
        if not marker.exists() and self.rank == 0:
            self._make(name, make)
        return self._wait(marker)

    def together(self, name: str, arguments: Sequence[str]) -> Json:
        """Return what ``edgekd arguments`` says, run by every process of the launch."""
        self._n_together += 1  # counted on all ranks and in all runs alike, skipped or not
        marker = self._marker(name)
        if not marker.exists():
            environment = launched_environment(os.environ, self._n_together)
            if self.rank == 0:
                self._make(name, lambda: self.edgekd(arguments, environment))
            else:
                self._checked(arguments, environment)
        return self._wait(marker)

    def edgekd(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> Json:
        """Return the JSON document that ``edgekd arguments`` ends with.

        Exits with the command and the place of its messages where it fails.
        """
        environment = environment or single_environment(os.environ)
        found: Json = json.loads(self._checked(arguments, environment).splitlines()[-1])
        return found

    def results(self) -> dict[str, Json]:
        """Return the result of every stage that has ended, by name."""
        return {marker.stem: self._read(marker)["result"] for marker in self._markers()}

    def seconds(self) -> dict[str, float]:
        """Return what every stage that has ended took, by name."""
        return {marker.stem: self._read(marker)["seconds"] for marker in self._markers()}

    def _checked(self, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
        log = self._work / f"log-{self.rank}.txt"
        code, stdout = self._run([*arguments, "--json", "--quiet"], environment, log)
        if code:
            sys.exit(f"edgekd {' '.join(arguments)}\nended with {code}; its messages are in {log}")
        return stdout

    def _make(self, name: str, make: Callable[[], Json]) -> None:
        print(name, file=sys.stderr, flush=True)
        start_s = time.monotonic()
        result = make()
        text = json.dumps({"seconds": time.monotonic() - start_s, "result": result})
        write_text_atomic(self._marker(name), text)

    def _wait(self, marker: Path) -> Json:
        while not marker.exists():  # only ranks above 0; a launcher ends them if rank 0 fails
            time.sleep(_POLL_S)
        result: Json = self._read(marker)["result"]
        return result

    def _markers(self) -> list[Path]:
        return sorted(
            (self._work / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime_ns
        )

    def _marker(self, name: str) -> Path:
        return self._work / "stages" / f"{name}.json"

    @staticmethod
    def _read(marker: Path) -> Json:
        found: Json = json.loads(marker.read_text("utf-8"))
        return found


def single_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return ``environment`` without what a launcher says of its processes."""
    return {key: value for key, value in environment.items() if not key.startswith(_LAUNCHED)}


def launched_environment(environment: Mapping[str, str], number: int) -> dict[str, str]:
    """Return ``environment`` for the command ``number`` that all processes of a launch start.

    Each meets at a port of its own and by a store of its own: the launcher's still holds what the
    command before left in it.
    """
    if "MASTER_PORT" not in environment:
        return dict(environment)
    port = int(environment["MASTER_PORT"]) + number
    own = {
        key: value for key, value in environment.items() if key != "TORCHELASTIC_USE_AGENT_STORE"
    }
    return own | {"MASTER_PORT": str(port)}
