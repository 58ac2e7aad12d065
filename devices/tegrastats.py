"""One line of NVIDIA's ``tegrastats``, in the three shapes that its releases write.

JetPack 5 and 6 give ``cpu@44.1C`` and ``VDD_IN 2957mW/2957mW`` (now/average); L4T 39 gives the
maximum as well, ``cpu@50C/50C`` and three values per rail; Thor tells no utilisation of its GPU.
"""

import re
from dataclasses import dataclass

_RAM = re.compile(r"\bRAM (\d+)/(\d+)MB")
_GPU = re.compile(r"\bGR3D_FREQ (?:(\d+)%)?@\[?(\d+(?:,\d+)*)\]?")
_GPU_OLD = re.compile(r"\bGR3D_FREQ (\d+)%(?!@)")
_TEMPERATURE = re.compile(r"\b([A-Za-z][\w-]*)@(-?\d+(?:\.\d+)?)C\b")
_RAIL = re.compile(r"\b([A-Z][A-Z0-9_]*) (-?\d+)mW(?:/-?\d+mW)*")
_MEBIBYTE = 2**20
_OFF_C = -256.0  # what a zone says whose unit is switched off


@dataclass(frozen=True, kw_only=True)
class Tegrastats:
    """What one line says; None where this release does not tell it."""

    memory_used_bytes: int | None
    memory_bytes: int | None
    gpu_percent: int | None
    gpu_frequency_hz: int | None
    """Of the fastest cluster."""
    temperatures_c: dict[str, float]
    rails_w: dict[str, float]


def parse_tegrastats(line: str) -> Tegrastats:
    """Return what ``line`` says; of a line of another program, nothing."""
    ram, gpu, old = _RAM.search(line), _GPU.search(line), _GPU_OLD.search(line)
    percent = (gpu[1] if gpu else None) or (old[1] if old else None)
    return Tegrastats(
        memory_used_bytes=int(ram[1]) * _MEBIBYTE if ram else None,
        memory_bytes=int(ram[2]) * _MEBIBYTE if ram else None,
        gpu_percent=int(percent) if percent else None,
        gpu_frequency_hz=max(map(int, gpu[2].split(","))) * 10**6 if gpu else None,
        temperatures_c={
            name: float(value)
            for name, value in _TEMPERATURE.findall(line)
            if float(value) > _OFF_C
        },
        rails_w={name: int(milliwatts) / 1e3 for name, milliwatts in _RAIL.findall(line)},
    )
