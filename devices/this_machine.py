"""The machine edgekd runs on, as a target for predictions."""

from edgekd.devices.detect import detect
from edgekd.devices.fit import Target
from edgekd.devices.probe import read_bandwidth_bytes_per_s


def this_machine(needs_probe: bool = True) -> Target:
    """Return this machine: memory free now, and its bandwidth unless measurements make up for it.

    The probe takes about a second and some hundred megabytes for each processor.
    """
    machine = detect()
    bandwidth = read_bandwidth_bytes_per_s(machine.n_usable_cores) if needs_probe else None
    return Target(
        name="this",
        memory_bytes=machine.memory_available_bytes,
        memory_note="available now",
        bandwidth_bytes_per_s=bandwidth,
        bandwidth_share=1.0,  # what was reached, not a peak on paper
        bandwidth_source=f"read by {machine.n_usable_cores} threads a moment ago"
        if bandwidth
        else "not probed",
    )
