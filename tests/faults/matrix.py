"""The fault matrix: command x fault -> what must come of it, and whether it does.

``refused``: exit code 1, one line that says what was found and what to do, everything as before.
``works``: exit code 0 and a whole result. ``either``: one of the two; a bit that is flipped in a
weight is a weight still, and a limit on memory may be wide enough.
``killed``: SIGKILL at a random moment; what is there loads, and the command started again works.
"""

import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from tests.faults.commands import COMMANDS, HUB_ID, Command, World, spoilt
from tests.faults.forks import NotPossibleError, Outcome, Zygote
from tests.faults.zygote import snapshot

Expected = Literal["refused", "works", "either", "killed"]
SPOILING = ("cut short", "flipped bit", "wrong type")
FAULTS = (
    *("SIGKILL", "full disk", "file-size limit", "read-only disk", *SPOILING),
    *("no memory", "no sensors", "no network"),
)
_HEADROOMS_BYTES = [0, 200_000, 1_000_000, 4_000_000, 64_000_000]
_IN_THE_ZYGOTE = {
    "full disk": "full",
    "file-size limit": "file-size",
    "read-only disk": "readonly",
    "no memory": "memory",
    "no sensors": "sensors",
    "no network": "network",
}


@dataclass(frozen=True)
class Cell:
    """One command with one fault."""

    command: Command
    fault: str
    expected: Expected

    @property
    def name(self) -> str:
        """What it is called in tables and tests."""
        return f"{self.command.name}, {self.fault}"


@dataclass(frozen=True)
class Verdict:
    """What came of a cell."""

    cell: Cell
    state: Literal["good", "bad", "not possible here"]
    said: str
    """The line on standard error, or what is wrong."""
    outcome: str = ""
    """``refused``, ``works`` or ``killed``."""


def cells() -> Iterator[Cell]:
    """Yield every cell that makes sense."""
    for command in COMMANDS:
        for fault in FAULTS:
            if (expected := _expected(command, fault)) is not None:
                yield Cell(command, fault, expected)


def _expected(command: Command, fault: str) -> Expected | None:
    """Return what must come of it; None where the fault does not touch the command."""
    writes = command.out is not None
    if command.name == "demo":
        # It takes minutes: what is tested is that it stops well before.
        is_short = fault in ("read-only disk", "no network")
        return "refused" if is_short else None
    if fault in ("full disk", "file-size limit"):
        return ("either" if command.is_small else "refused") if writes else None
    if fault == "read-only disk":
        return "refused" if writes else "works"
    if fault in SPOILING:
        if command.model is None:
            return None
        is_checked = command.name.startswith(("verify", "cache inspect", "package"))
        return "refused" if is_checked or fault != "flipped bit" else "either"
    if fault == "no network":
        return "refused" if command.takes_hub_id else "works"
    if fault == "no memory":
        return "refused" if command.memory_bytes else "either"
    return "killed" if fault == "SIGKILL" else "works"


class Runner:
    """Runs cells in a world."""

    def __init__(self, zygote: Zygote, world: World, seed: int = 0) -> None:
        """Keep what every cell needs."""
        self._zygote, self._world, self._draw = zygote, world, Random(seed)
        self._results: dict[str, Path] = {}
        self._seconds: dict[str, float] = {}

    def run(self, cell: Cell) -> Verdict:
        """Return what comes of ``cell``."""
        try:
            with tempfile.TemporaryDirectory(prefix="edgekd-fault-") as name:
                folder = Path(name)
                if cell.expected == "killed":
                    return self._run_killed(cell, folder)
                return self._run_broken(cell, folder)
        except NotPossibleError as error:
            return Verdict(cell, "not possible here", str(error))

    def _run_broken(self, cell: Cell, folder: Path) -> Verdict:
        place = self._place_with_old(cell.command, folder)
        model = None
        if cell.fault in SPOILING:
            assert cell.command.model
            (folder / "input").mkdir()
            source = self._world.folder / cell.command.model
            model = spoilt(source, folder / "input", cell.fault, self._draw)
        elif cell.fault == "no network" and cell.command.takes_hub_id:
            model = Path(HUB_ID)
        outcome = self._start(
            cell.command,
            place,
            folder,
            model,
            fault=_IN_THE_ZYGOTE.get(cell.fault),
            headroom_bytes=self._draw.choice(_HEADROOMS_BYTES),
            memory_bytes=cell.command.memory_bytes,
        )
        result_fault = self._check(cell, place, folder) if not cell.fault.endswith("disk") else None
        return _judge(cell, outcome, result_fault)

    def _run_killed(self, cell: Cell, folder: Path) -> Verdict:
        command = cell.command
        place = self._place_with_old(command, folder)
        clean = snapshot(self._clean(command))
        whole_s = self._seconds[command.name]
        moment_s = self._draw.uniform(0.02, whole_s)
        outcome = self._start(command, place, folder, None, kill_after_s=moment_s)
        if outcome.orphans:
            return Verdict(cell, "bad", f"processes live on: {outcome.orphans}")
        if fault := self._check(cell, place, folder):
            return Verdict(cell, "bad", f"after {moment_s:.2f} s: {fault}")
        if command.refuses_old and (place / (command.out or "")).exists():
            is_whole = snapshot(place).keys() == clean.keys() | {"other.txt"}
            return Verdict(cell, "good" if is_whole else "bad", "a part of a result", "killed")
        again = self._start(command, place, folder, None)
        if again.code not in _endings(command):
            return Verdict(cell, "bad", f"started again: {again.stderr.strip()[-300:]}")
        if left := sorted(again.after.keys() - clean.keys() - {"other.txt"}):
            return Verdict(cell, "bad", f"left after another run: {left}")
        if command.appends and again.after.get(command.out or "") != clean[command.out or ""]:
            return Verdict(cell, "bad", "the lines of the killed and the next run are others")
        fault = self._check(cell, place, folder)
        return Verdict(cell, "bad" if fault else "good", fault or "", "killed")

    def _place_with_old(self, command: Command, folder: Path) -> Path:
        """Return a folder with the result of an earlier run, and something else.

        A command that goes on with earlier results, or refuses them, finds none.
        """
        place = folder / "place"
        if command.resumes or command.refuses_old or command.name == "demo":
            place.mkdir()
        else:
            shutil.copytree(self._clean(command), place)
        (place / "other.txt").write_text("not ours")
        return place

    def _clean(self, command: Command) -> Path:
        """Return a folder with the result of ``command`` alone; it is run once."""
        if (found := self._results.get(command.name)) is None:
            found = self._world.folder / f"clean-{len(self._results)}"
            found.mkdir()
            with tempfile.TemporaryDirectory() as scratch:
                outcome = self._start(command, found, Path(scratch), None)
            assert outcome.code in _endings(command), (command.name, outcome)
            self._results[command.name] = found
            self._seconds[command.name] = outcome.seconds
        return found

    def _start(
        self,
        command: Command,
        place: Path,
        folder: Path,
        model: Path | None,
        **more: Any,
    ) -> Outcome:
        scratch = Path(tempfile.mkdtemp(dir=folder))
        cache = scratch / "home"
        cache.mkdir()
        environment = {
            "XDG_CACHE_HOME": str(cache),
            "HF_HOME": str(cache),
            "EDGEKD_API_KEY": "x",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        argv = command.arguments(self._world, place, model)
        return self._zygote.run(
            argv,
            place,
            scratch,
            stdin=command.stdin,
            env=environment,
            stop_when_it_speaks=command.is_endless,
            **more,
        )

    def _check(self, cell: Cell, place: Path, folder: Path) -> str | None:
        """Return what is wrong with the result, if there is one."""
        command = cell.command
        if not command.check or not command.out or not (place / command.out).exists():
            return None
        scratch = Path(tempfile.mkdtemp(dir=folder))
        outcome = self._zygote.run(command.checking(self._world, place), place, scratch)
        if command.name.startswith("cache") and "not finished" in outcome.stderr:
            return None  # and no later command takes it for finished
        allowed = (0, 3) if command.name == "bench" else (0,)
        return None if outcome.code in allowed else f"its result is bad: {outcome.stderr[-300:]}"


def _judge(cell: Cell, outcome: Outcome, result_fault: str | None) -> Verdict:
    lines = [line for line in outcome.stderr.splitlines() if line.strip()]
    said = lines[-1] if lines else ""
    state = "works" if outcome.code in _endings(cell.command) else "refused"
    wrong = result_fault
    if outcome.orphans:
        wrong = f"processes live on: {outcome.orphans}"
    elif outcome.killed:
        wrong = f"hung for {outcome.seconds:.0f} s: {said}"
    elif cell.expected not in (state, "either"):
        wrong = f"exit code {outcome.code}: {outcome.stderr[-600:]}"
    elif state == "refused":
        wrong = _refusal_fault(cell, outcome, lines)
    if wrong:
        return Verdict(cell, "bad", wrong, state)
    return Verdict(cell, "good", said if state == "refused" else "", state)


def _refusal_fault(cell: Cell, outcome: Outcome, lines: list[str]) -> str | None:
    command = cell.command
    if outcome.code != command.refusal:
        return f"exit code {outcome.code}: {outcome.stderr[-600:]}"
    if cell.fault == "no memory" and "Traceback" not in outcome.stderr:
        lines = lines[-1:]  # before it, libraries of child processes may say the same
    if len(lines) != 1 or not lines[0].startswith("edgekd: "):
        return f"{len(lines)} lines: {outcome.stderr[-1500:]}"
    changed = {
        name
        for name in outcome.before.keys() | outcome.after.keys()
        if outcome.before.get(name) != outcome.after.get(name)
        and not (command.resumes and name.split("/")[0] == command.out)
    }
    return f"refused, and changed {sorted(changed)}" if changed else None


def _endings(command: Command) -> set[int]:
    """Return the exit codes that say all is well; a server is ended by SIGTERM."""
    return {*command.endings, *([-signal.SIGTERM] if command.is_endless else [])}
