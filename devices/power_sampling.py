"""Energy as power summed over time, for machines that count no joules.

A thread reads the sensor ten times a second; between two readings the power is taken to change
evenly. Peaks shorter than that are missed, which is why the reason names the number of readings.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from edgekd.devices.battery import battery_power
from edgekd.devices.host import Host
from edgekd.devices.rails import rail_powers, whole_power
from edgekd.devices.raspberry import is_raspberry, pmic_power
from edgekd.devices.reading import Reading

_PERIOD_S = 0.1


@dataclass(frozen=True)
class PowerSource:
    """One sensor of watts."""

    name: str
    read: Callable[[], Reading]


def find_power_source(host: Host) -> PowerSource | None:
    """Return the sensor that covers most of ``host``; None where none can be read."""
    readers: list[Callable[[Host], Reading]] = [
        lambda host: whole_power(rail_powers(host)),
        battery_power,
    ]
    if is_raspberry(host):
        readers.append(pmic_power)
    tried = [(reader, reading) for reader in readers if (reading := reader(host)).value is not None]
    tried.sort(key=lambda pair: pair[1].status == "estimated")
    if not tried:
        return None
    reader, reading = tried[0]
    return PowerSource(reading.source, lambda: reader(host))


def integrate(samples: list[tuple[float, float]]) -> float:
    """Return the joules of ``samples``, pairs of seconds and watts, by trapezoids."""
    pairs = zip(samples, samples[1:], strict=False)
    return sum((t2 - t1) * (w1 + w2) / 2 for (t1, w1), (t2, w2) in pairs)


class PowerSampler:
    """Reads a sensor of watts between ``start`` and ``stop`` and adds up joules."""

    def __init__(self, source: PowerSource) -> None:
        """Read from ``source``."""
        self._source = source
        self._total_j = 0.0
        self._n_samples = 0
        self._fault: str | None = None
        self._note: str | None = None
        self._samples: list[tuple[float, float]] = []
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin a span."""
        self._stopping.clear()
        self._samples = []
        self._sample()
        self._thread = threading.Thread(target=self._loop, name="edgekd-power", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the span."""
        self._stopping.set()
        if self._thread:
            self._thread.join()
        self._sample()
        self._total_j += integrate(self._samples)
        self._n_samples += len(self._samples)

    def joules(self) -> Reading:
        """Return the joules of all spans, or why there are none."""
        name = self._source.name
        if self._fault:
            return Reading.unavailable("J", name, self._fault)
        reason = f"{self._n_samples} readings of watts summed over time"
        if self._note:
            reason += f"; {self._note}"
        return Reading.estimated(self._total_j, "J", name, reason)

    def _loop(self) -> None:
        while not self._stopping.wait(_PERIOD_S):
            self._sample()

    def _sample(self) -> None:
        reading = self._source.read()
        if reading.value is None:
            self._fault = reading.reason
            return
        self._note = reading.reason
        self._samples.append((time.perf_counter(), reading.value))
