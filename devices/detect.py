"""What the machine is: processor, memory, system, board and graphics cards.

Numbers of one machine say nothing about another, so every report carries this description.
Files are read below ``root``; a test replays a device by writing its tree into a folder. What
cannot be found out is None, never a guess.
"""

import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from edgekd.devices.processors import instruction_sets, processor_name

_LIVE = Path("/")
_GPU_QUERY = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
_GPU_TIMEOUT_S = 10


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One graphics card, as nvidia-smi describes it."""

    name: str
    memory_bytes: int | None
    driver: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine a number was measured on."""

    architecture: str
    """As the kernel names it: ``x86_64``, ``aarch64``, ``arm64``."""
    processor: str | None
    n_usable_cores: int
    """Logical processors that this process may run on."""
    instruction_sets: tuple[str, ...] | None
    """The ones that decide how fast int4 and bf16 kernels are, under the kernel's names."""
    memory_bytes: int | None
    memory_available_bytes: int | None
    system: str
    kernel: str
    board: str | None
    """Jetson, Raspberry Pi and other boards with a device tree."""
    gpus: tuple[Gpu, ...]
    governor: str | None
    """CPU frequency governor; several are joined with a comma."""
    on_battery: bool | None
    python: str

    def as_dict(self) -> dict[str, Any]:
        """Return the description as JSON values."""
        return asdict(self)


def detect(root: Path = _LIVE) -> Machine:
    """Return what the machine whose files lie below ``root`` is."""
    cpuinfo = read_text(root / "proc/cpuinfo")
    total_bytes, available_bytes = memory_bytes(root)
    return Machine(
        architecture=platform.machine(),
        processor=processor_name(cpuinfo) if cpuinfo else platform.processor() or None,
        n_usable_cores=_usable_cores(),
        instruction_sets=instruction_sets(cpuinfo) if cpuinfo else None,
        memory_bytes=total_bytes,
        memory_available_bytes=available_bytes,
        system=_system(root),
        kernel=read_text(root / "proc/sys/kernel/osrelease") or platform.release(),
        board=read_text(root / "proc/device-tree/model"),
        gpus=_gpus(root),
        governor=governor(root),
        on_battery=_on_battery(root),
        python=platform.python_version(),
    )


def governor(root: Path = _LIVE) -> str | None:
    """Return the CPU frequency governors in use; None where the kernel offers none."""
    files = root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    return ", ".join(sorted({text for file in files if (text := read_text(file))})) or None


def memory_bytes(root: Path = _LIVE) -> tuple[int | None, int | None]:
    """Return total and available bytes of memory; None where the tree does not say."""
    if (text := read_text(root / "proc/meminfo")) is None:
        if root != _LIVE:
            return None, None
        memory = psutil.virtual_memory()
        return memory.total, memory.available
    sizes = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if (words := rest.split()) and words[0].isdigit():
            sizes[name] = int(words[0]) * 1024  # the file says kB and means KiB
    return sizes.get("MemTotal"), sizes.get("MemAvailable")


def read_text(file: Path) -> str | None:
    """Return the stripped text of ``file``; None where it cannot be read or is empty."""
    try:
        # Device-tree strings end in a NUL.
        return file.read_text("utf-8", errors="replace").strip("\0 \t\n") or None
    except OSError:
        return None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _system(root: Path) -> str:
    for line in (read_text(root / "etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip("\"'")
    return f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else platform.system()


def _on_battery(root: Path) -> bool | None:
    """Return whether a battery feeds the machine; None where no power supply is known."""
    statuses, has_supply = [], False
    for supply in root.glob("sys/class/power_supply/*"):
        if read_text(supply / "scope") == "Device":  # a mouse's battery
            continue
        has_supply = True
        if read_text(supply / "type") == "Battery":
            statuses.append(read_text(supply / "status"))
    return "Discharging" in statuses if has_supply else None


def _gpus(root: Path) -> tuple[Gpu, ...]:
    """Return the graphics cards that nvidia-smi lists; none where it is absent or fails."""
    folders = [str(root / entry.lstrip("/")) for entry in os.get_exec_path()]
    program = shutil.which("nvidia-smi", path=os.pathsep.join(folders))
    if program is None:
        return ()
    try:
        reply = subprocess.run(
            [program, *_GPU_QUERY], capture_output=True, text=True, timeout=_GPU_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = reply.stdout.splitlines() if reply.returncode == 0 else []
    return tuple(gpu for line in lines if (gpu := _parse_gpu(line)))


def _parse_gpu(line: str) -> Gpu | None:
    fields = [field.strip() for field in line.rsplit(",", 2)]
    if len(fields) != 3:
        return None
    name, mebibytes, driver = fields
    # Boards that share one memory between CPU and GPU answer [N/A].
    memory_bytes = int(mebibytes) * 2**20 if mebibytes.isdigit() else None
    return Gpu(name=name, memory_bytes=memory_bytes, driver=driver)
