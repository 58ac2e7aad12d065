"""Power that flows out of the battery: all that the machine uses, but only while unplugged.

https://docs.kernel.org/power/power_supply_class.html gives microvolts and microamperes; some
phones give milliamperes, and the sign of a discharge differs between drivers.
"""

from edgekd.devices.host import Host
from edgekd.devices.reading import Reading

_FOLDER = "sys/class/power_supply"
# No machine that runs a language model draws less than 10 mA: such a number is in mA already.
_LEAST_MICROAMPERES = 10_000


def battery_power(host: Host) -> Reading:
    """Return the watts that flow out of all batteries of the machine, or why it is not known."""
    batteries = [
        folder
        for folder in host.folders(f"{_FOLDER}/*")
        if host.text(f"{folder}/type") == "Battery" and host.text(f"{folder}/scope") != "Device"
    ]
    source = str(host.root / _FOLDER)
    if not batteries:
        return Reading.unavailable("W", source, "the machine has no battery")
    draining = [f for f in batteries if host.text(f"{f}/status") == "Discharging"]
    if not draining:
        return Reading.unavailable("W", source, "the machine is plugged in; unplug it")
    readings = [_power_of(host, folder) for folder in draining]
    if missing := [reading for reading in readings if reading.value is None]:
        return missing[0]
    total_w = sum(reading.value or 0.0 for reading in readings)
    if reasons := [reading.reason for reading in readings if reading.reason]:
        return Reading.estimated(total_w, "W", source, reasons[0])
    return Reading.measured(total_w, "W", source)


def power_from_current(voltage_uv: int, current: int, source: str) -> Reading:
    """Return the watts of ``current`` at ``voltage_uv``; a small number is taken as mA."""
    watts = abs(current) * voltage_uv / 1e12
    if abs(current) >= _LEAST_MICROAMPERES:
        return Reading.measured(watts, "W", source)
    reason = f"{current} cannot be microamperes; taken as milliamperes"
    return Reading.estimated(watts * 1e3, "W", source, reason)


def _power_of(host: Host, folder: str) -> Reading:
    source = str(host.root / folder)
    if (microwatts := host.number(f"{folder}/power_now")) is not None:
        return Reading.measured(abs(microwatts) / 1e6, "W", f"{source}/power_now")
    current = host.number(f"{folder}/current_now")
    voltage_uv = host.number(f"{folder}/voltage_now")
    if current is None or voltage_uv is None:
        return Reading.unavailable("W", source, f"{source} tells neither power nor current")
    return power_from_current(voltage_uv, current, f"{source}/current_now")
