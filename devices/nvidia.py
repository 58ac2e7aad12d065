"""Graphics cards of NVIDIA, by its ``nvidia-smi``: no library has to be loaded for it.

On Jetson it answers ``[N/A]`` for memory and power: CPU and GPU share one memory there, and the
rails tell the power.
"""

import re
from dataclasses import dataclass

from edgekd.devices.host import Host
from edgekd.devices.reading import Reading

_FIELDS = (
    *("name", "memory.total", "driver_version"),
    *("power.draw", "temperature.gpu", "clocks_throttle_reasons.active"),
)
QUERY = ("nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
_IDLE = 0x1  # nvmlClocksEventReasonGpuIdle: no throttling


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One graphics card, as nvidia-smi describes it."""

    name: str
    memory_bytes: int | None
    driver: str


@dataclass(frozen=True, kw_only=True)
class GpuSensors:
    """What one card measures."""

    power: Reading
    temperature: Reading
    throttling: Reading
    """The bits of ``nvmlClocksEventReasons`` that slow it down; 0 where none does."""


def list_gpus(host: Host) -> list[tuple[Gpu, GpuSensors]]:
    """Return the graphics cards that nvidia-smi lists; none where it is absent or fails."""
    reply = host.run(QUERY)
    lines = reply.text.splitlines() if reply.code == 0 else []
    return [found for line in lines if (found := parse_gpu(line))]


def parse_gpu(line: str) -> tuple[Gpu, GpuSensors] | None:
    """Return what one line of the reply says; None where it is no such line."""
    fields = [field.strip() for field in line.rsplit(",", len(_FIELDS) - 1)]
    if len(fields) != len(_FIELDS):
        return None
    name, mebibytes, driver, watts, celsius, reasons = fields
    memory_bytes = int(mebibytes) * 2**20 if mebibytes.isascii() and mebibytes.isdigit() else None
    sensors = GpuSensors(
        power=_reading(watts, "W"),
        temperature=_reading(celsius, "°C"),
        throttling=_throttling(reasons),
    )
    return Gpu(name=name, memory_bytes=memory_bytes, driver=driver), sensors


def _reading(text: str, unit: str) -> Reading:
    if not re.fullmatch(r"\d{1,6}(?:\.\d+)?", text, re.ASCII):
        return Reading.unavailable(unit, "nvidia-smi", f"it says {text!r}")
    return Reading.measured(float(text), unit, "nvidia-smi")


def _throttling(text: str) -> Reading:
    try:
        bits = int(text, 16) & ~_IDLE
    except ValueError:
        return Reading.unavailable("flags", "nvidia-smi", f"it says {text!r}")
    return Reading.measured(bits, "flags", "nvidia-smi")
