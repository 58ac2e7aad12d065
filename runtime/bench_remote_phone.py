"""One Android phone over adb: a folder of its own there, files pushed into it, a program run.

The serial and what the user named reach no shell unquoted. What the phone answers is not trusted:
bounded in size and time, and every row is checked.
"""

import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgekd.devices.android import over_adb, phone_power, phone_temperatures, phone_throttling
from edgekd.devices.host import Reply, Runner
from edgekd.errors import DataError, DeviceError, EngineError
from edgekd.files import size_of
from edgekd.progress import Progress
from edgekd.runtime.bench_remote_address import AdbAddress
from edgekd.runtime.bench_remote_artifact import Artifact
from edgekd.runtime.bench_remote_document import parse_json
from edgekd.runtime.bench_remote_tied import Ended, run_streaming, shell_line, tied, unsaid
from edgekd.runtime.llama_bench_rows import parse_rows, samples_of, scenario_of
from edgekd.units import format_bytes

_PLACE = "/data/local/tmp"  # the one folder in which the shell user may run programs
_SPARE_BYTES = 1 << 20
_ASK_S = 10.0
# Of a bench that was killed while it pushed; a day, so that none that runs loses its own.
_SWEEP = 'find "$1" -maxdepth 1 -name "edgekd-*" -mtime +0 -exec rm -rf {} +'
_FREE = re.compile(r"(\d+)\s+\d+%\s")


def _ask(command: Sequence[str]) -> Reply:
    """Answer as devices.host.run_command does, but within the bounds of an untrusted answer."""
    ended = run_streaming(command, timeout_s=_ASK_S)
    return Reply(ended.code, ended.output or "\n".join(ended.errors))


class Phone:
    """One phone that adb reaches."""

    def __init__(self, address: AdbAddress, progress: Progress) -> None:
        """Remember which; ``progress`` hears what is pushed and what the programs there say."""
        self._address, self._progress = address, progress
        self.ask: Runner = over_adb(_ask, address.serial)

    def need_answer(self) -> None:
        """Look whether it is there; remove what a killed bench left behind long ago.

        Raises:
            DeviceError: it does not answer.
        """
        ended = self._get_state()
        if ended.code or ended.output.strip() != "device":
            found = ended.last_line if ended.code else ended.output.strip()
            raise DeviceError(
                f"{self._address} does not answer: {found}; allow debugging on the phone, and "
                "look at 'adb devices'"
            )
        self._adb("shell", shell_line(_SWEEP, _PLACE))

    def state(self) -> dict[str, Any]:
        """Return heat and power at this moment."""
        return {
            "thermal_status": asdict(phone_throttling(self.ask)),
            "temperatures": {k: asdict(v) for k, v in phone_temperatures(self.ask).items()},
            "battery_power": asdict(phone_power(self.ask)),
        }

    def measure(
        self, artifact: Artifact, binary: Path, options: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return llama-bench's rows of one model; leave nothing behind.

        Raises:
            DeviceError: the phone has no room, or was lost meanwhile.
            EngineError: ``binary`` failed there, or is no llama-bench.
        """
        folder = f"{_PLACE}/edgekd-{artifact.sha256[:12]}-{secrets.token_hex(4)}"
        files = [binary, *sorted(binary.absolute().parent.glob("lib*.so"))]
        self._need_room(artifact.n_bytes + sum(map(size_of, files)))
        try:
            self._shell('mkdir "$1"', folder)
            self._push(artifact.path, f"{folder}/{artifact.name}", artifact.n_bytes)
            for file in files:
                self._push(file, f"{folder}/{file.name}", size_of(file))
            self._shell('chmod 755 "$1"', f"{folder}/{binary.name}")
            command = [f"{folder}/{binary.name}", "-m", f"{folder}/{artifact.name}", *options]
            line = tied(["env", f"LD_LIBRARY_PATH={folder}", *command], f"rm -rf {folder}")
            rows = self._rows(self._adb("shell", line, say=self._progress.say))
        finally:
            self._adb("shell", shell_line('rm -rf "$1"', folder))
        return [{**row, "model_filename": str(artifact.path)} for row in rows]

    def _rows(self, ended: Ended) -> list[dict[str, Any]]:
        rows = parse_rows(ended.output) if ended.code == 0 else None
        if rows is not None:
            return [self._checked(row) for row in rows]
        if self._get_state().code:
            raise DeviceError(
                f"the connection to {self._address} was lost while it measured; what ran there was "
                "ended and removed, connect the phone and run the same command again"
            )
        said = ended.last_line if ended.code else f"no rows, but {ended.output.strip()[:80]!r}"
        raise EngineError(
            f"{self._address}: llama-bench failed: {said}; --remote-binary must be a llama-bench "
            "built for the phone, its lib*.so beside it"
        )

    def _checked(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return ``row``, of which any figure can be computed and any text be shown."""
        checked: dict[str, Any] | None = parse_json(json.dumps(row))
        try:
            if checked is None:
                raise DataError("a row of llama-bench with a number that is none")
            scenario_of(checked)
            samples_of(checked)
        except DataError as error:
            raise EngineError(
                f"{self._address}: {error}; --remote-binary must be a llama-bench"
            ) from error
        return checked

    def _need_room(self, needed: int) -> None:
        found = _FREE.search(self._adb("shell", f"df -k {_PLACE}").output)
        if found and int(found[1]) * 1024 < needed + _SPARE_BYTES:
            raise DeviceError(
                f"{self._address} has {format_bytes(int(found[1]) * 1024)} free in {_PLACE}, "
                f"{format_bytes(needed + _SPARE_BYTES)} are needed; make room there"
            )

    def _push(self, source: Path, target: str, n_bytes: int) -> None:
        self._progress.say(f"pushing {source.name} ({format_bytes(n_bytes)}) to {self._address}")
        ended = self._adb("push", str(source.absolute()), target)
        if ended.code:
            # Of a push, adb writes what went wrong to its standard output, a summary after it.
            said = [line for line in ended.output.splitlines() if line.startswith("adb: error:")]
            found = said[-1] if said else ended.last_line
            raise DeviceError(
                f"{source.name} did not arrive on {self._address}: {found}; look at "
                "'adb devices' and at the room on the phone, and try again"
            )

    def _shell(self, script: str, *arguments: str) -> None:
        ended = self._adb("shell", shell_line(script, *arguments))
        if ended.code:
            raise DeviceError(f"{self._address} refused a step: {ended.last_line}")

    def _get_state(self) -> Ended:
        return run_streaming(self._words("get-state"), timeout_s=_ASK_S)

    def _adb(self, *words: str, say: Callable[[str], None] = unsaid) -> Ended:
        return run_streaming(self._words(*words), say)

    def _words(self, *words: str) -> tuple[str, ...]:
        return ("adb", "-s", self._address.serial, *words)
