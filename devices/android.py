"""An Android phone: over ``adb`` from another machine, or in a terminal on the phone itself.

What a phone draws can be told only while it is unplugged, so energy needs adb over Wi-Fi.
"""

import re
from collections.abc import Sequence

from edgekd.devices.battery import power_from_current
from edgekd.devices.host import Reply, Runner, parse_int
from edgekd.devices.reading import Reading

_PROPERTY = re.compile(r"^\[(?P<key>[^\]]+)\]: \[(?P<value>.*)\]$", re.MULTILINE)
_BATTERY_LINE = re.compile(r"^\s*(?P<key>[A-Za-z][\w -]*): (?P<value>\S+)\s*$", re.MULTILINE)
_TEMPERATURE = re.compile(r"Temperature\{mValue=(-?[\d.]+), mType=-?\d+, mName=([^,]+), mStatus")
_STATUS = re.compile(r"^\s*Thermal Status: (\d+)", re.MULTILINE)
_POWERED = ("AC powered", "USB powered", "Wireless powered", "Dock powered")
# Where drivers of different makers put the flow of the battery.
_BATTERIES = ("battery", "bms", "maxfg")
_FOLDER = "/sys/class/power_supply"


def over_adb(run: Runner, serial: str | None = None) -> Runner:
    """Return a runner whose commands run on the phone ``serial``, or on the only one."""
    prefix = ("adb", "-s", serial, "shell") if serial else ("adb", "shell")

    def run_there(command: Sequence[str]) -> Reply:
        return run((*prefix, *command))

    return run_there


def parse_properties(text: str) -> dict[str, str]:
    """Return the properties that ``getprop`` lists."""
    return {match["key"]: match["value"] for match in _PROPERTY.finditer(text)}


def phone_identity(run: Runner) -> dict[str, str | None]:
    """Return model and system on chip; older Exynos phones name the chip elsewhere."""
    properties = parse_properties(run(("getprop",)).output)
    soc = properties.get("ro.soc.model") or properties.get("ro.hardware.chipname")
    return {
        "soc_model": soc or None,
        "soc_maker": properties.get("ro.soc.manufacturer"),
        "model": properties.get("ro.product.model"),
        "system": f"Android {properties['ro.build.version.release']}"
        if "ro.build.version.release" in properties
        else None,
        "architecture": properties.get("ro.product.cpu.abi"),
    }


def parse_battery(text: str) -> dict[str, str]:
    """Return the lines of ``dumpsys battery``."""
    return {match["key"]: match["value"] for match in _BATTERY_LINE.finditer(text)}


def phone_power(run: Runner) -> Reading:
    """Return the watts that flow out of the phone's battery, or why they are not known."""
    source = "dumpsys battery"
    state = parse_battery(run(("dumpsys", "battery")).output)
    if not state:
        return Reading.unavailable("W", source, "dumpsys battery says nothing")
    if powered := [name for name in _POWERED if state.get(name) == "true"]:
        reason = f"the phone is plugged in ({powered[0]}); unplug it and use adb over Wi-Fi"
        return Reading.unavailable("W", source, reason)
    current, where = _first_number(run, "current_now")
    if current is None:
        reason = f"no battery driver under {_FOLDER} tells its current"
        return Reading.unavailable("W", source, reason)
    microvolts, _ = _first_number(run, "voltage_now")
    if microvolts is None:
        millivolts = parse_int(state.get("voltage"))
        microvolts = millivolts * 1000 if millivolts else None
    if microvolts is None:
        return Reading.unavailable("W", where, "the voltage of the battery is not told")
    return power_from_current(microvolts, current, where)


def phone_temperatures(run: Runner) -> dict[str, Reading]:
    """Return the phone's temperatures by name, the battery's among them."""
    found: dict[str, Reading] = {}
    for value, name in _TEMPERATURE.findall(run(("dumpsys", "thermalservice")).output):
        try:
            found[name] = Reading.measured(float(value), "°C", "dumpsys thermalservice")
        except ValueError:
            continue
    tenths = parse_int(parse_battery(run(("dumpsys", "battery")).output).get("temperature"))
    if tenths is not None:
        found.setdefault("battery", Reading.measured(tenths / 10, "°C", "dumpsys battery"))
    return found


def phone_throttling(run: Runner) -> Reading:
    """Return Android's thermal status: 0 none, 1 light, 2 moderate, 3 severe ... 6 shutdown."""
    source = "dumpsys thermalservice"
    match = _STATUS.search(run(("dumpsys", "thermalservice")).output)
    if match is None:
        return Reading.unavailable("level 0-6", source, "no thermal status is told")
    return Reading.measured(int(match[1]), "level 0-6", source)


def _first_number(run: Runner, name: str) -> tuple[int | None, str]:
    for battery in _BATTERIES:
        path = f"{_FOLDER}/{battery}/{name}"
        reply = run(("cat", path))
        if reply.code == 0 and (number := parse_int(reply.text.strip())) is not None:
            return number, path
    return None, _FOLDER
