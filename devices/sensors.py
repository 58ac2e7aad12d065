"""Everything a machine can measure about itself at one moment: power, temperature, throttling.

Energy over a span is the business of ``edgekd.devices.energy``.
"""

from dataclasses import asdict, dataclass
from typing import Any

from edgekd.devices.android import phone_power, phone_temperatures, phone_throttling
from edgekd.devices.apple import chip_name, mac_powers
from edgekd.devices.battery import battery_power
from edgekd.devices.host import Host, Runner
from edgekd.devices.nvidia import GpuSensors, list_gpus
from edgekd.devices.rails import rail_powers, whole_power
from edgekd.devices.raspberry import (
    firmware_temperature,
    is_raspberry,
    pmic_power,
    throttle_flags,
)
from edgekd.devices.reading import Reading
from edgekd.devices.tegrastats import parse_tegrastats
from edgekd.devices.thermal import temperatures, throttle_counts

_TEGRASTATS = ("timeout", "3", "tegrastats", "--interval", "500")


@dataclass(frozen=True, kw_only=True)
class Sensors:
    """What was read at one moment."""

    power: Reading
    """Watts of the machine, or of as much of it as is measured: see status and reason."""
    rails: dict[str, Reading]
    """Watts of parts of it."""
    temperatures: dict[str, Reading]
    throttling: dict[str, Reading]
    """Counts and flags; all 0 on a machine that was never slowed down."""

    def as_dict(self) -> dict[str, Any]:
        """Return the readings as JSON values."""
        return asdict(self)


def read_sensors(host: Host) -> Sensors:
    """Return what the sensors of ``host`` say now."""
    gpus = [sensors for _, sensors in list_gpus(host)]
    rails = rail_powers(host) or _tegrastats_rails(host)
    found_c = temperatures(host)
    throttling = throttle_counts(host)
    if is_raspberry(host):
        found_c["firmware"] = firmware_temperature(host)
        throttling |= throttle_flags(host)
    if chip_name(host):
        rails |= mac_powers(host)
    for number, gpu in enumerate(gpus):
        rails[f"gpu {number}"] = gpu.power
        found_c[f"gpu {number}"] = gpu.temperature
        throttling[f"gpu {number}"] = gpu.throttling
    return Sensors(
        power=_power(host, rails, gpus),
        rails=rails,
        temperatures=found_c,
        throttling=throttling or {"throttling": _no_throttling()},
    )


def read_phone_sensors(run: Runner) -> Sensors:
    """Return what the sensors of the phone say whose commands ``run`` runs."""
    return Sensors(
        power=phone_power(run),
        rails={},
        temperatures=phone_temperatures(run),
        throttling={"thermal status": phone_throttling(run)},
    )


def _power(host: Host, rails: dict[str, Reading], gpus: list[GpuSensors]) -> Reading:
    """Return the power that comes nearest to that of the whole machine."""
    tried = [battery_power(host)]
    if is_raspberry(host):
        tried.append(pmic_power(host))
    if "Combined" in rails:
        tried.append(rails["Combined"])
    without_gpus = {name: value for name, value in rails.items() if not name.startswith("gpu ")}
    tried.append(whole_power(without_gpus))
    tried += [gpu.power for gpu in gpus]
    known = [reading for reading in tried if reading.value is not None]
    # A measured value goes before an estimate.
    known.sort(key=lambda reading: reading.status == "estimated")
    if known:
        return known[0]
    reasons = "; ".join(dict.fromkeys(reading.reason or "" for reading in tried))
    return Reading.unavailable("W", "every sensor", reasons)


def _tegrastats_rails(host: Host) -> dict[str, Reading]:
    """Return the rails that ``tegrastats`` tells, for a Jetson whose files are not readable."""
    if "nvidia,tegra" not in (host.text("proc/device-tree/compatible") or ""):
        return {}
    lines = host.run(_TEGRASTATS).text.strip().splitlines()
    rails_w = parse_tegrastats(lines[-1]).rails_w if lines else {}
    return {name: Reading.measured(watts, "W", "tegrastats") for name, watts in rails_w.items()}


def _no_throttling() -> Reading:
    return Reading.unavailable("events", "sysfs", "no counter of throttling is offered here")
