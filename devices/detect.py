"""What the machine is: processor, memory, system, board, accelerators and power mode.

Numbers of one machine say nothing about another, so every report carries this description.
Files are read below a root and commands go through a runner; a test replays a device by writing
its tree into a folder. What cannot be found out is None, never a guess.
"""

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from edgekd.devices.android import phone_identity
from edgekd.devices.apple import chip_name, mac_memory_bytes
from edgekd.devices.emulation import emulated_on
from edgekd.devices.host import LIVE_ROOT, Host, Runner, read_text
from edgekd.devices.npus import list_npus
from edgekd.devices.nvidia import Gpu, list_gpus
from edgekd.devices.processors import instruction_sets, processor_name
from edgekd.devices.spec import list_specs

__all__ = ["Gpu", "Machine", "detect", "detect_phone", "governor", "memory_bytes", "read_text"]


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
    """Jetson, Raspberry Pi and other boards with a device tree; the model of a phone."""
    gpus: tuple[Gpu, ...]
    governor: str | None
    """CPU frequency governor; several are joined with a comma."""
    on_battery: bool | None
    python: str
    soc_model: str | None = None
    """System on chip of a phone: ``SM8850``."""
    npus: tuple[str, ...] = ()
    """Accelerators for neural networks that a kernel driver has claimed."""
    power_mode: str | None = None
    """Of a Jetson (``15W``) or a laptop (``balanced``): it changes speeds by half."""
    firmware: str | None = None
    """Release of a Jetson's board support: ``R36.4.3``."""
    device: str | None = None
    """Name of the published specification that this is, see ``edgekd devices list``."""
    emulated_on: str | None = None
    """Architecture of the real processor where the one named above is emulated."""

    def as_dict(self) -> dict[str, Any]:
        """Return the description as JSON values."""
        return asdict(self)


def detect(root: Path = LIVE_ROOT, run: Runner | None = None) -> Machine:
    """Return what the machine is whose files lie below ``root`` and whose commands ``run`` runs."""
    host = Host.at(root, run)
    cpuinfo = host.text("proc/cpuinfo")
    total_bytes, available_bytes = memory_bytes(root)
    board = host.text("proc/device-tree/model") or host.text("sys/class/dmi/id/product_name")
    processor = _processor(host, cpuinfo)
    architecture = _architecture(host)
    return Machine(
        architecture=architecture,
        processor=processor,
        n_usable_cores=_usable_cores(host, cpuinfo),
        instruction_sets=instruction_sets(cpuinfo) if cpuinfo else None,
        memory_bytes=total_bytes or mac_memory_bytes(host),
        memory_available_bytes=available_bytes,
        system=_system(host),
        kernel=host.text("proc/sys/kernel/osrelease")
        or (platform.release() if _is_live(host) else "unknown"),
        board=board,
        gpus=tuple(gpu for gpu, _ in list_gpus(host)),
        governor=governor(root),
        on_battery=_on_battery(host),
        python=platform.python_version(),
        npus=list_npus(host),
        power_mode=_power_mode(host),
        firmware=_firmware(host),
        device=_device_name({"board": board, "processor": processor}),
        emulated_on=emulated_on(host, architecture, cpuinfo),
    )


def detect_phone(run: Runner) -> Machine:
    """Return what the Android phone is whose commands ``run`` runs."""
    found = phone_identity(run)
    total_bytes, available_bytes = _memory(run(("cat", "/proc/meminfo")).output)
    cpuinfo = run(("cat", "/proc/cpuinfo")).output
    return Machine(
        architecture=found["architecture"] or "unknown",
        processor=processor_name(cpuinfo),
        n_usable_cores=max(1, _count_cores(cpuinfo)),
        instruction_sets=instruction_sets(cpuinfo) or None,
        memory_bytes=total_bytes,
        memory_available_bytes=available_bytes,
        system=found["system"] or "Android",
        kernel=run(("uname", "-r")).output or "unknown",
        board=found["model"],
        gpus=(),
        governor=None,
        on_battery=None,
        python="none: asked over adb",
        soc_model=found["soc_model"],
        device=_device_name({"soc_model": found["soc_model"]}),
    )


def governor(root: Path = LIVE_ROOT) -> str | None:
    """Return the CPU frequency governors in use; None where the kernel offers none."""
    files = root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    return ", ".join(sorted({text for file in files if (text := read_text(file))})) or None


def memory_bytes(root: Path = LIVE_ROOT) -> tuple[int | None, int | None]:
    """Return total and available bytes of memory; None where the tree does not say."""
    if (text := read_text(root / "proc/meminfo")) is not None:
        return _memory(text)
    if root != LIVE_ROOT:
        return None, None
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _memory(meminfo: str) -> tuple[int | None, int | None]:
    sizes = {}
    for line in meminfo.splitlines():
        name, _, rest = line.partition(":")
        if (words := rest.split()) and words[0].isascii() and words[0].isdigit():
            sizes[name] = int(words[0]) * 1024  # the file says kB and means KiB
    return sizes.get("MemTotal"), sizes.get("MemAvailable")


def _is_live(host: Host) -> bool:
    return host.root == LIVE_ROOT


def _architecture(host: Host) -> str:
    if _is_live(host):
        return platform.machine()
    return host.run(("uname", "-m")).output or "unknown"


def _processor(host: Host, cpuinfo: str | None) -> str | None:
    if cpuinfo:
        return processor_name(cpuinfo)
    return chip_name(host) or (platform.processor() or None if _is_live(host) else None)


def _usable_cores(host: Host, cpuinfo: str | None) -> int:
    if not _is_live(host):
        return max(1, _count_cores(cpuinfo or ""))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count_cores(cpuinfo: str) -> int:
    return sum(line.startswith("processor") for line in cpuinfo.splitlines())


def _system(host: Host) -> str:
    for line in (host.text("etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip("\"'")
    if not _is_live(host):
        return "unknown"
    return f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else platform.system()


def _on_battery(host: Host) -> bool | None:
    """Return whether a battery feeds the machine; None where no power supply is known."""
    statuses, has_supply = [], False
    for folder in host.folders("sys/class/power_supply/*"):
        if host.text(f"{folder}/scope") == "Device":  # a mouse's battery
            continue
        has_supply = True
        if host.text(f"{folder}/type") == "Battery":
            statuses.append(host.text(f"{folder}/status"))
    return "Discharging" in statuses if has_supply else None


def _power_mode(host: Host) -> str | None:
    reply = host.run(("nvpmodel", "-q"))
    for line in reply.text.splitlines() if reply.code == 0 else []:
        if line.startswith("NV Power Mode:"):
            return line.partition(":")[2].strip()
    return host.text("sys/firmware/acpi/platform_profile")


def _firmware(host: Host) -> str | None:
    """Return ``R36.4.3`` out of ``# R36 (release), REVISION: 4.3, ...``."""
    match (host.text("etc/nv_tegra_release") or "").replace(",", " ").split():
        case ["#", release, "(release)", "REVISION:", revision, *_]:
            return f"{release}.{revision}"
    return None


def _device_name(found: dict[str, str | None]) -> str | None:
    return next((spec.name for spec in list_specs() if spec.matches(found)), None)
