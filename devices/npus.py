"""Accelerators for neural networks that a driver of the kernel has claimed.

Intel's are PCI devices of the ``accel`` class, AMD's belong to the driver ``amdxdna``; the numbers
are those of the drivers' tables, drivers/accel/ivpu and drivers/accel/amdxdna in Linux.
"""

from edgekd.devices.host import Host

_KNOWN = {
    ("0x8086", "0x643e"): "Intel NPU (Lunar Lake)",
    ("0x8086", "0x7d1d"): "Intel NPU (Meteor Lake)",
    ("0x8086", "0xb03e"): "Intel NPU (Panther Lake)",
    ("0x1022", "0x17f0"): "AMD XDNA 2",
    ("0x1022", "0x1502"): "AMD XDNA",
}
_FOLDERS = ("sys/class/accel/accel*/device", "sys/bus/pci/drivers/amdxdna/*")


def list_npus(host: Host) -> tuple[str, ...]:
    """Return the name of every accelerator; an unknown one under its PCI numbers."""
    found: dict[str, None] = {}
    for folder in (folder for pattern in _FOLDERS for folder in host.folders(pattern)):
        numbers = (host.text(f"{folder}/vendor"), host.text(f"{folder}/device"))
        if numbers[0] and numbers[1]:
            found[
                _KNOWN.get((numbers[0], numbers[1]), f"accelerator {numbers[0]}:{numbers[1]}")
            ] = None
    return tuple(found)
