"""A Mac: its name by ``sysctl``, its power by ``powermetrics``, which only root may run."""

import re

from edgekd.devices.host import Host, parse_int
from edgekd.devices.reading import Reading

_METER = ("powermetrics", "-n", "1", "-i", "200", "--samplers", "cpu_power,gpu_power,ane_power")
_POWER = re.compile(r"^(CPU|GPU|ANE|Combined) Power(?: \([^)]*\))?: (\d+) mW$", re.MULTILINE)
_WHOLE = "Combined"


def chip_name(host: Host) -> str | None:
    """Return the chip, such as ``Apple M4``; None where this is no Mac."""
    reply = host.run(("sysctl", "-n", "machdep.cpu.brand_string"))
    return reply.output or None


def mac_memory_bytes(host: Host) -> int | None:
    """Return the bytes of memory; None where this is no Mac."""
    reply = host.run(("sysctl", "-n", "hw.memsize"))
    return parse_int(reply.output)


def mac_powers(host: Host) -> dict[str, Reading]:
    """Return the watts of CPU, GPU, Neural Engine and their sum; display and rest not included."""
    source = " ".join(_METER)
    reply = host.run(_METER)
    watts = {name: int(value) / 1e3 for name, value in _POWER.findall(reply.text)}
    if not watts:
        said = (reply.text.strip().splitlines() or ["no answer"])[0]
        reason = f"{said}; only root may read it: sudo edgekd ..."
        return {_WHOLE: Reading.unavailable("W", source, reason)}
    return {name: Reading.measured(value, "W", source) for name, value in watts.items()}
