"""What is installed, what is missing, and what will spoil a measurement on this machine.

Packages are looked up, never imported: a broken one must not take the report down with it.
"""

import os
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from edgekd.devices.backends import BACKENDS, Backend, install_command
from edgekd.devices.detect import governor, memory_bytes, read_text
from edgekd.devices.energy import EnergyMeter
from edgekd.units import format_bytes

Status = Literal["ok", "missing", "warning"]

# Package -> the extra that brings it.
_PACKAGES = {
    "llama-cpp-python": "gguf",
    "onnxruntime": "onnx",
    "onnxruntime-qnn": "qnn",
    "torch": "torch",
    "transformers": "torch",
    "accelerate": "distill",
    "datasets": "distill",
    "gguf": "export",
    "onnx": "export",
    "fastapi": "serve",
    "uvicorn": "serve",
    "llguidance": "serve",
}
_MIN_MEMORY_BYTES = 2_000_000_000
_MIN_DISK_BYTES = 5_000_000_000
_BUSY_PERCENT = 5.0


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    subject: str
    status: Status
    found: str
    """What is there, as text for people."""
    advice: str | None = None
    """What to do; None where all is well."""
    evidence: str | None = None
    """Of a backend: why it has the label that was found."""


def diagnose(root: Path = Path("/"), cache: Path | None = None) -> list[Check]:
    """Return every check of the machine below ``root``; models are fetched into ``cache``."""
    return [
        *(_check_package(package, extra) for package, extra in _PACKAGES.items()),
        *(_check_backend(backend) for backend in BACKENDS.values()),
        _check_memory(root),
        _check_disk(cache or _cache_folder()),
        _check_compiler(),
        _check_energy(root),
        _check_governor(root),
        _check_load(root),
    ]


def _check_package(package: str, extra: str) -> Check:
    try:
        return Check(package, "ok", version(package))
    except PackageNotFoundError:
        return Check(package, "missing", "not installed", f"pip install 'edgekd[{extra}]'")


def _check_backend(backend: Backend) -> Check:
    """Return how far the backend was tried; its package may well be missing here."""
    subject = f"backend: {backend.title}"
    try:
        version(backend.package)
    except PackageNotFoundError:
        advice = install_command(backend)
        return Check(subject, "missing", backend.label, advice, backend.evidence)
    return Check(subject, "ok", backend.label, evidence=backend.evidence)


def _check_memory(root: Path) -> Check:
    _, available = memory_bytes(root)
    if available is None:
        return Check("free memory", "warning", "unknown", "the system does not say")
    found = f"{format_bytes(available)} available"
    if available < _MIN_MEMORY_BYTES:
        advice = f"close programs, {format_bytes(_MIN_MEMORY_BYTES)} are needed for small models"
        return Check("free memory", "warning", found, advice)
    return Check("free memory", "ok", found)


def _cache_folder() -> Path:
    """Return where the hub's client puts models, by its own environment variables."""
    if folder := os.environ.get("HF_HUB_CACHE"):
        return Path(folder)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("HF_HOME", cache / "huggingface")) / "hub"


def _check_disk(cache: Path) -> Check:
    cache = cache.absolute()
    present = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(present).free
    found = f"{format_bytes(free)} free for {cache}"
    if free < _MIN_DISK_BYTES:
        return Check("disk", "warning", found, "make room, or set HF_HOME to another disk")
    return Check("disk", "ok", found)


def _check_compiler() -> Check:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        advice = "install g++ or clang++ where llama-cpp-python must be built from source"
        return Check("C++ compiler", "missing", "none on the path", advice)
    return Check("C++ compiler", "ok", found)


def _check_energy(root: Path) -> Check:
    reading = EnergyMeter(root).probe()
    if reading.status == "measured":
        return Check("energy sensor", "ok", reading.source)
    advice = "energy fields of reports stay empty; nothing is estimated in their place"
    return Check("energy sensor", "missing", reading.reason or "unavailable", advice)


def _check_governor(root: Path) -> Check:
    found = governor(root)
    if found is None:
        return Check("CPU governor", "ok", "not offered by this kernel")
    if found == "powersave":
        advice = "for measurements: sudo cpupower frequency-set -g performance"
        return Check("CPU governor", "warning", found, advice)
    return Check("CPU governor", "ok", found)


def _check_load(root: Path) -> Check:
    busy = _pressure_percent(root / "proc/pressure/cpu")
    if busy is None:
        return Check("other load", "ok", "not told by this kernel")
    found = f"tasks waited for a processor {busy:.1f} % of the last 10 s"
    if busy > _BUSY_PERCENT:
        return Check("other load", "warning", found, "measure once the machine is quiet")
    return Check("other load", "ok", found)


def _pressure_percent(file: Path) -> float | None:
    """Return avg10 of the ``some`` line, https://docs.kernel.org/accounting/psi.html."""
    for line in (read_text(file) or "").splitlines():
        if line.startswith("some "):
            fields = dict(field.split("=", 1) for field in line.split()[1:])
            return float(fields["avg10"])
    return None
