"""What the firmware of a Raspberry Pi tells through ``vcgencmd``.

https://www.raspberrypi.com/documentation/computers/os.html#vcgencmd
"""

import re

from edgekd.devices.host import Host
from edgekd.devices.reading import Reading

_FLAGS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
_HAPPENED = 16  # the same flags, 16 bits up: since the start
# A published fit against a wall meter (RPi5-power): the monitor of the supply does not see all
# rails. Hence the result is an estimate.
_WALL_FACTOR, _WALL_OFFSET_W = 1.1451, 0.5879
_RAIL = re.compile(r"^\s*(\w+)_([AV]) (?:current|volt)\(\d+\)=(\S+?)[AV]\s*$", re.MULTILINE)


def is_raspberry(host: Host) -> bool:
    """Return whether ``host`` is a Raspberry Pi."""
    return (host.text("proc/device-tree/model") or "").startswith("Raspberry Pi")


def pmic_power(host: Host) -> Reading:
    """Return the watts at the wall, estimated from the supply chip of a Raspberry Pi 5."""
    reply = host.run(("vcgencmd", "pmic_read_adc"))
    source = "vcgencmd pmic_read_adc"
    if not reply.is_good or "error=" in reply.text:
        reason = f"only a Raspberry Pi 5 tells it: {reply.text.strip() or 'no answer'}"
        return Reading.unavailable("W", source, reason)
    rails_w = parse_pmic(reply.text)
    if not rails_w:
        return Reading.unavailable("W", source, "no rail has both a voltage and a current")
    watts = sum(rails_w.values()) * _WALL_FACTOR + _WALL_OFFSET_W
    reason = f"sum of {len(rails_w)} rails x {_WALL_FACTOR} + {_WALL_OFFSET_W} W"
    return Reading.estimated(watts, "W", source, reason)


def parse_pmic(text: str) -> dict[str, float]:
    """Return the watts of each rail that tells both its voltage and its current."""
    values: dict[str, dict[str, float]] = {}
    for name, unit, number in _RAIL.findall(text):
        try:
            value = float(number)
        except ValueError:
            continue
        if 0 <= value < 1000:  # also leaves out nan, which a rail that is off may say
            values.setdefault(name, {})[unit] = value
    return {name: pair["A"] * pair["V"] for name, pair in values.items() if len(pair) == 2}


def firmware_temperature(host: Host) -> Reading:
    """Return the temperature of the processor, from ``temp=39.5'C``."""
    reply, source = host.run(("vcgencmd", "measure_temp")), "vcgencmd measure_temp"
    match = re.fullmatch(r"temp=(-?\d+(?:\.\d+)?)'C", reply.text.strip())
    if not match:
        return Reading.unavailable("°C", source, f"not understood: {reply.text.strip()[:80]!r}")
    return Reading.measured(float(match[1]), "°C", source)


def throttle_flags(host: Host) -> dict[str, Reading]:
    """Return each flag, now and since the start, as 0 or 1."""
    reply, source = host.run(("vcgencmd", "get_throttled")), "vcgencmd get_throttled"
    match = re.fullmatch(r"throttled=(0x[0-9a-fA-F]{1,8})", reply.text.strip())
    if not match:
        reason = f"not understood: {reply.text.strip()[:80]!r}"
        return {"throttling": Reading.unavailable("flag", source, reason)}
    bits = int(match[1], 16)
    found = {}
    for bit, name in _FLAGS.items():
        found[f"{name} now"] = Reading.measured(bits >> bit & 1, "flag", source)
        happened = bits >> (bit + _HAPPENED) & 1
        found[f"{name} since start"] = Reading.measured(happened, "flag", source)
    return found
