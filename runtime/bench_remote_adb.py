"""``llama-bench`` on an Android phone over adb: the user's own binary, its rows brought back.

A phone has no Python, so what measures is a llama-bench built for it (NDK). Model, binary and the
libraries beside it are pushed into a folder of /data/local/tmp, which is removed afterwards, by the
phone itself where the connection is lost.
"""

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgekd.devices.android import over_adb, phone_power, phone_temperatures, phone_throttling
from edgekd.devices.detect import detect_phone
from edgekd.devices.host import Runner, run_command
from edgekd.errors import DeviceError, EngineError, RecipeError
from edgekd.files import size_of
from edgekd.progress import Progress, Silence
from edgekd.runtime.bench_remote_address import AdbAddress
from edgekd.runtime.bench_remote_artifact import Artifact, read_artifact
from edgekd.runtime.bench_remote_tied import Ended, run_streaming, shell_line, tied
from edgekd.runtime.bench_settings import BenchSettings
from edgekd.runtime.llama_bench_rows import PHONE_SCHEMA, parse_rows
from edgekd.runtime.model_kind import ModelKind
from edgekd.units import format_bytes

_PLACE = "/data/local/tmp"  # the one folder in which the shell user may run programs
_SPARE_BYTES = 1 << 20
_FREE = re.compile(r"(\d+)\s+\d+%\s")


def run_bench_over_adb(
    models: Sequence[str],
    settings: BenchSettings,
    address: AdbAddress,
    progress: Progress | None = None,
    *,
    binary: Path,
) -> dict[str, Any]:
    """Return what ``binary``, a llama-bench for the phone, measured of each model there.

    The document holds llama-bench's rows, the phone, and its heat before and after.

    Raises:
        ModelError: a model is not there, or is none.
        RecipeError: a model is no GGUF, or a setting is one that llama-bench does not have.
        DeviceError: the phone does not answer, has no room, or was lost meanwhile.
        EngineError: the binary failed there.
    """
    progress = progress or Silence()
    artifacts = [read_artifact(model) for model in models]
    _need_possible(artifacts, settings, binary)
    phone = _Phone(address, progress)
    phone.need_answer()
    before = phone.state()
    rows: list[dict[str, Any]] = []
    for artifact in artifacts:
        rows += phone.measure(artifact, binary, llama_bench_options(settings))
    after = phone.state()
    reasons = _reasons(before, after)
    return {
        "schema": PHONE_SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings.as_dict(),
        "machine": {**detect_phone(phone.ask).as_dict(), "address": str(address)},
        "models": [
            {"path": str(a.path), "sha256": a.sha256, "file_bytes": a.n_bytes} for a in artifacts
        ],
        "conditions": {"before": before, "after": after},
        "valid": not reasons,
        "invalid_reasons": reasons,
        "rows": rows,
    }


def llama_bench_options(settings: BenchSettings) -> list[str]:
    """Return the options of llama-bench that mean ``settings``."""
    words = ["-p", str(settings.prompt_tokens), "-n", str(settings.decode_tokens)]
    words += ["-r", str(settings.repetitions), "-o", "json"]
    if settings.depths != (0,):  # builds of before 2025-04 do not know -d
        words += ["-d", ",".join(map(str, settings.depths))]
    return words + ([] if settings.n_threads is None else ["-t", str(settings.n_threads)])


class _Phone:
    """One phone that adb reaches."""

    def __init__(self, address: AdbAddress, progress: Progress) -> None:
        self._address, self._progress = address, progress
        self.ask: Runner = over_adb(run_command, address.serial)

    def need_answer(self) -> None:
        ended = self._adb("get-state")
        if ended.code or ended.output.strip() != "device":
            found = ended.last_line if ended.code else ended.output.strip()
            raise DeviceError(
                f"{self._address} does not answer: {found}; allow debugging on the phone, and "
                "look at 'adb devices'"
            )

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
        """Return llama-bench's rows of one model; leave nothing behind."""
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
            return rows
        if self._adb("get-state").code:
            raise DeviceError(
                f"the connection to {self._address} was lost while it measured; what ran there was "
                "ended and removed, connect the phone and run the same command again"
            )
        said = ended.last_line if ended.code else f"no rows, but {ended.output.strip()[:80]!r}"
        raise EngineError(
            f"{self._address}: llama-bench failed: {said}; --remote-binary must be a llama-bench "
            "built for the phone, its lib*.so beside it"
        )

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
            raise DeviceError(
                f"{source.name} did not arrive on {self._address}: {ended.last_line}; look at "
                "'adb devices' and at the room on the phone, and try again"
            )

    def _shell(self, script: str, *arguments: str) -> None:
        ended = self._adb("shell", shell_line(script, *arguments))
        if ended.code:
            raise DeviceError(f"{self._address} refused a step: {ended.last_line}")

    def _adb(self, *words: str, say: Callable[[str], None] = lambda line: None) -> Ended:
        return run_streaming(("adb", "-s", self._address.serial, *words), say)


def _need_possible(artifacts: Sequence[Artifact], settings: BenchSettings, binary: Path) -> None:
    """Refuse before anything is pushed.

    Raises:
        RecipeError: something that llama-bench on a phone cannot do.
    """
    if not binary.is_file():
        raise RecipeError(f"--remote-binary {binary} is no file; give a llama-bench for the phone")
    for artifact in artifacts:
        if artifact.kind is not ModelKind.GGUF:
            raise RecipeError(
                f"{artifact.path} is no GGUF, which is what llama-bench reads; for an ONNX folder: "
                "edgekd package --target android, and run-adb.sh in it"
            )
    if settings.soak_minutes:
        raise RecipeError("llama-bench has no soak; leave out --soak")


def _reasons(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return why the figures are not the model's: any throttling, as on other machines."""
    return [
        f"the phone throttled {when} the run: thermal status {level:g} of 6; let it cool"
        for when, state in (("before", before), ("after", after))
        if (level := state["thermal_status"]["value"])
    ]
