"""Power of supply rails, in watts, from the kernel's hwmon folders.

Jetson boards carry INA3221 monitors with three channels: millivolts and milliamperes. Graphics
drivers give microwatts. https://docs.kernel.org/hwmon/ina3221.html, hwmon/sysfs-interface.html
"""

import re

from edgekd.devices.host import Host
from edgekd.devices.reading import Reading

_FOLDERS = ("sys/class/hwmon/hwmon*", "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*")
_CHANNELS = range(1, 7)  # in7 is the sum of the shunts' voltages, no rail
_UNCONNECTED = "NC"
# Rails that feed a whole module; AGX Orin has none.
_WHOLE_RAILS = ("VDD_IN", "VIN")
_AMD_PACKAGE = "PPT"  # package power tracking: of the whole processor


def rail_powers(host: Host) -> dict[str, Reading]:
    """Return the watts of every rail, by its label; a part of a rail's files gives a reason."""
    found: dict[str, Reading] = {}
    for folder in hwmon_folders(host):
        name = host.text(f"{folder}/name") or "hwmon"
        if name.startswith("ina3221") or "ina3221" in folder:
            found |= _ina3221(host, folder)
        else:
            found |= _driver_powers(host, folder, name)
    return found


def hwmon_folders(host: Host) -> list[str]:
    """Return each hwmon folder once, under whichever of its paths was found first."""
    seen, kept = set(), []
    for folder in (folder for pattern in _FOLDERS for folder in host.folders(pattern)):
        place = (host.root / folder).resolve()
        if place not in seen:
            seen.add(place)
            kept.append(folder)
    return kept


def whole_power(rails: dict[str, Reading]) -> Reading:
    """Return the watts of the whole board out of its ``rails``, or of what they cover.

    A sum of rails is an estimate: on an AGX Orin it was 2.28 times below the power at the wall.
    """
    for name in (*_WHOLE_RAILS, f"amdgpu {_AMD_PACKAGE}"):
        if (reading := rails.get(name)) and reading.value is not None:
            return reading
    known = {name: r.value for name, r in rails.items() if r.value is not None}
    if not known:
        return Reading.unavailable("W", "hwmon", "no power rail can be read")
    # Near zero the monitors of idle rails may say less than nothing.
    total_w = sum(max(0.0, watts) for watts in known.values())
    names = ", ".join(known)
    return Reading.estimated(total_w, "W", names, f"no rail feeds the whole board; sum of {names}")


def _ina3221(host: Host, folder: str) -> dict[str, Reading]:
    found = {}
    for channel in _CHANNELS:
        label = host.text(f"{folder}/in{channel}_label")
        if label is None or label == _UNCONNECTED:
            continue
        source = f"{host.root / folder}/{{in,curr}}{channel}_input"
        millivolts = host.number(f"{folder}/in{channel}_input")
        milliamperes = host.number(f"{folder}/curr{channel}_input")
        if millivolts is None or milliamperes is None:
            found[label] = Reading.unavailable("W", source, f"cannot read {source}")
        else:
            found[label] = Reading.measured(millivolts * milliamperes / 1e6, "W", source)
    return found


def _driver_powers(host: Host, folder: str, driver: str) -> dict[str, Reading]:
    found = {}
    for file in sorted((host.root / folder).glob("power*_*")):
        match = re.fullmatch(r"power(\d+)_(input|average)", file.name)
        if match is None:
            continue
        label = f"{driver} {host.text(f'{folder}/power{match[1]}_label') or f'power{match[1]}'}"
        microwatts = host.number(f"{folder}/{file.name}")
        if microwatts is None:
            found[label] = Reading.unavailable("W", str(file), f"cannot read {file}")
        else:
            found[label] = Reading.measured(microwatts / 1e6, "W", str(file))
    return found
