"""What spoils a measurement: seen before and after it, and judged.

A throttled, swapping or shared machine gives figures that look like any others. So each of them
becomes a field and a warning with advice, and the run is invalid where the figures cannot be
those of the model on this machine.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekd.devices.detect import Machine, detect, governor, read_text

_OTHER_LOAD_WARN, _OTHER_LOAD_INVALID = 0.05, 0.25
"""Share of the processors' time that went to other programs: doubtful, and no measurement."""
_STEAL_WARN, _STEAL_INVALID = 0.02, 0.10
"""Share that the hypervisor gave to other machines."""
_SWAP_PAGES_INVALID = 256  # 1 MB at the usual page size; a quiet machine swaps none


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The machine at one moment; None is what it does not tell."""

    time_s: float
    temperature_c: float | None
    """Of the hottest zone."""
    frequency_mhz: float | None
    """Mean over the processors."""
    governor: str | None
    on_battery: bool | None
    load_average: float | None
    """Over one minute."""
    cpu_pressure_percent: float | None
    """Share of the last 10 s in which a task waited for a processor."""
    throttle_events: int | None
    swapped_pages: int | None
    busy_s: float | None
    """Processor time of all programs since the start of the system."""
    steal_s: float | None
    total_s: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the snapshot as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    code: str
    message: str
    advice: str
    invalid: bool
    """Whether the figures are void."""


def take_snapshot(root: Path = Path("/")) -> Snapshot:
    """Return the state of the machine whose files lie below ``root``."""
    busy_s, steal_s, total_s = _processor_times(root)
    loads = (read_text(root / "proc/loadavg") or "").split()
    return Snapshot(
        time_s=time.monotonic(),
        temperature_c=_temperature(root),
        frequency_mhz=_frequency(root),
        governor=governor(root),
        on_battery=detect(root).on_battery,
        load_average=float(loads[0]) if loads else None,
        cpu_pressure_percent=_pressure(root),
        throttle_events=_throttle_events(root),
        swapped_pages=_swapped_pages(root),
        busy_s=busy_s,
        steal_s=steal_s,
        total_s=total_s,
    )


def other_load_share(before: Snapshot, after: Snapshot, own_s: float) -> float | None:
    """Return the share of processor time that other programs took; ``own_s`` was ours."""
    if before.busy_s is None or after.busy_s is None:
        return None
    total_s = (after.total_s or 0.0) - (before.total_s or 0.0)
    return max(0.0, after.busy_s - before.busy_s - own_s) / total_s if total_s > 0 else None


def judge(before: Snapshot, after: Snapshot, own_s: float) -> list[Finding]:
    """Return what spoils a measurement between two snapshots, with advice."""
    return [
        *_judge_counters(before, after),
        *_judge_load(before, after, own_s),
        *_judge_settings(after),
    ]


def judge_machine(machine: Machine) -> list[Finding]:
    """Return what voids every time taken on ``machine``: that its instructions are emulated."""
    if machine.emulated_on is None:
        return []
    return [
        Finding(
            "emulated",
            f"{machine.architecture} is emulated on {machine.emulated_on}: no time, memory or "
            "energy here is that of a device",
            "measure speed on the device itself; tokens and quality hold",
            True,
        )
    ]


def _judge_counters(before: Snapshot, after: Snapshot) -> Iterator[Finding]:
    throttled = _moved(before.throttle_events, after.throttle_events)
    if throttled:
        yield Finding(
            "throttled",
            f"the processor throttled {throttled} times while it was measured",
            "cool it, let it rest between runs, or set a power mode that it can hold",
            True,
        )
    swapped = _moved(before.swapped_pages, after.swapped_pages)
    if swapped:
        yield Finding(
            "swapping",
            f"{swapped} pages were swapped while it was measured",
            "close programs, or measure a smaller model",
            swapped >= _SWAP_PAGES_INVALID,
        )


def _judge_load(before: Snapshot, after: Snapshot, own_s: float) -> Iterator[Finding]:
    other = other_load_share(before, after, own_s)
    if other is not None and other > _OTHER_LOAD_WARN:
        yield Finding(
            "other-load",
            f"other programs took {other:.0%} of the processors' time",
            "stop them and measure again",
            other > _OTHER_LOAD_INVALID,
        )
    total_s = (after.total_s or 0.0) - (before.total_s or 0.0)
    steal = ((after.steal_s or 0.0) - (before.steal_s or 0.0)) / total_s if total_s > 0 else 0.0
    if steal > _STEAL_WARN:
        yield Finding(
            "steal",
            f"the hypervisor gave {steal:.0%} of the processors' time to other machines",
            "measure at another time, or on a machine of its own",
            steal > _STEAL_INVALID,
        )


def _judge_settings(after: Snapshot) -> Iterator[Finding]:
    if after.on_battery:
        advice = "plug it in, unless the speed on battery is what you want to know"
        yield Finding("battery", "the machine runs on its battery", advice, False)
    if after.governor and "powersave" in after.governor:
        advice = "sudo cpupower frequency-set -g performance"
        yield Finding("governor", f"the CPU governor is {after.governor}", advice, False)


def _moved(before: int | None, after: int | None) -> int:
    return 0 if before is None or after is None else after - before


def _processor_times(root: Path) -> tuple[float | None, float | None, float | None]:
    """Return busy, stolen and total seconds over all processors: proc(5), /proc/stat."""
    fields = (read_text(root / "proc/stat") or "").partition("\n")[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return None, None, None
    per_s = os.sysconf("SC_CLK_TCK")
    # guest time, further on, is part of user time already
    user, nice, system, idle, waiting, irq, softirq, steal = (int(f) / per_s for f in fields[1:9])
    busy_s = user + nice + system + irq + softirq
    return busy_s, steal, busy_s + idle + waiting + steal


def _temperature(root: Path) -> float | None:
    found = _numbers(root, "sys/class/thermal/thermal_zone[0-9]*/temp")
    return max(found) / 1000 if found else None


def _frequency(root: Path) -> float | None:
    found = _numbers(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    return sum(found) / len(found) / 1000 if found else None


def _throttle_events(root: Path) -> int | None:
    """Return the kernel's counters: Intel's by core and package, Jetson's over-current ones."""
    cpu = "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle"
    found = _numbers(root, f"{cpu}/core_throttle_count")
    found += _numbers(root, f"{cpu}/package_throttle_count")
    for name in root.glob("sys/class/hwmon/hwmon*/name"):
        if read_text(name) == "soctherm_oc":
            found += _numbers(name.parent, "oc[0-9]_event_cnt")
    return int(sum(found)) if found else None


def _swapped_pages(root: Path) -> int | None:
    lines = (read_text(root / "proc/vmstat") or "").splitlines()
    counts = [int(line.split()[1]) for line in lines if line.startswith(("pswpin ", "pswpout "))]
    return sum(counts) if counts else None


def _pressure(root: Path) -> float | None:
    for line in (read_text(root / "proc/pressure/cpu") or "").splitlines():
        if line.startswith("some "):
            return float(dict(part.split("=", 1) for part in line.split()[1:])["avg10"])
    return None


def _numbers(root: Path, pattern: str) -> list[float]:
    texts = (read_text(file) for file in root.glob(pattern))
    return [float(text) for text in texts if text and text.lstrip("-").isdigit()]
