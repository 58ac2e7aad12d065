"""Temperatures in degrees Celsius and what the kernel counts when a processor is slowed down.

https://docs.kernel.org/driver-api/thermal/sysfs-api.html: millidegrees. A sensor that is switched
off answers an error or a number that no running machine has; both are reported as unavailable.
"""

from edgekd.devices.host import Host
from edgekd.devices.rails import hwmon_folders
from edgekd.devices.reading import Reading

_PLAUSIBLE_C = (-40.0, 150.0)
_THROTTLE = "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle"
# What the over-current counters of Jetson's soctherm stand for.
_SOCTHERM = {
    "oc1_event_cnt": "under-voltage events",
    "oc2_event_cnt": "average over-current events",
    "oc3_event_cnt": "instantaneous over-current events",
}


def temperatures(host: Host) -> dict[str, Reading]:
    """Return the temperature of every zone, by its name; equal names are numbered."""
    found: dict[str, Reading] = {}
    for folder in host.folders("sys/class/thermal/thermal_zone*"):
        name = host.text(f"{folder}/type") or folder.rpartition("/")[2]
        _add(found, name, _celsius(host, f"{folder}/temp"))
    for folder in hwmon_folders(host):
        driver = host.text(f"{folder}/name") or "hwmon"
        for file in sorted((host.root / folder).glob("temp*_input")):
            label = host.text(f"{folder}/{file.name.replace('_input', '_label')}")
            name = f"{driver} {label}" if label else driver
            _add(found, name, _celsius(host, f"{folder}/{file.name}"))
    return found


def throttle_counts(host: Host) -> dict[str, Reading]:
    """Return how often the processor was slowed down since it was started, by cause."""
    found = {}
    for kind in ("core", "package"):
        counts = [
            count
            for folder in host.folders(_THROTTLE)
            if (count := host.number(f"{folder}/{kind}_throttle_count")) is not None
        ]
        if counts:
            # Every core of a package tells the package's count.
            count = sum(counts) if kind == "core" else max(counts)
            found[f"{kind} throttling"] = Reading.measured(count, "events", _THROTTLE)
    for folder in hwmon_folders(host):
        if host.text(f"{folder}/name") == "soctherm_oc":
            for file, meaning in _SOCTHERM.items():
                if (count := host.number(f"{folder}/{file}")) is not None:
                    source = f"{host.root / folder}/{file}"
                    found[meaning] = Reading.measured(count, "events", source)
    return found


def _celsius(host: Host, path: str) -> Reading:
    millidegrees, source = host.number(path), str(host.root / path)
    if millidegrees is None:
        return Reading.unavailable("°C", source, f"cannot read {source}: switched off or forbidden")
    least, most = _PLAUSIBLE_C
    if not least <= millidegrees / 1e3 <= most:
        reason = f"{source} says {millidegrees / 1e3:g} °C, outside {least:g} to {most:g}"
        return Reading.unavailable("°C", source, reason)
    return Reading.measured(millidegrees / 1e3, "°C", source)


def _add(found: dict[str, Reading], name: str, reading: Reading) -> None:
    number, key = 2, name
    while key in found:
        key, number = f"{name} {number}", number + 1
    found[key] = reading
