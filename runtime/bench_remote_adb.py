"""``llama-bench`` on an Android phone over adb: the user's own binary, its rows brought back.

A phone has no Python, so what measures is a llama-bench built for it (NDK). Model, binary and the
libraries beside it are pushed into a folder of /data/local/tmp, which is removed afterwards, by the
phone itself where the connection is lost.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgekd.devices.detect import detect_phone
from edgekd.errors import RecipeError
from edgekd.progress import Progress, Silence
from edgekd.runtime.bench_remote_address import AdbAddress
from edgekd.runtime.bench_remote_artifact import Artifact, read_artifact
from edgekd.runtime.bench_remote_phone import Phone
from edgekd.runtime.bench_settings import BenchSettings
from edgekd.runtime.llama_bench_rows import PHONE_SCHEMA
from edgekd.runtime.model_kind import ModelKind


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
    phone = Phone(address, progress)
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
