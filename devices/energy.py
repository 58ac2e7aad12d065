"""Energy: from the RAPL counters of Intel and AMD, else from a power sensor read again and again.

The counter covers the whole package, idle draw and other processes included. Since Linux 5.10
only root may read it (CVE-2020-8694). Where it cannot be read there is no number: nothing here
falls back to an estimate from the thermal design power. Boards without such counters (Jetson,
Raspberry Pi, a laptop on battery) tell watts; those are summed over time.
https://docs.kernel.org/power/powercap/powercap.html
"""

import re
from pathlib import Path
from typing import Self

from edgekd.devices.host import LIVE_ROOT, Host, Runner
from edgekd.devices.power_sampling import PowerSampler, find_power_source
from edgekd.devices.reading import Reading

_FOLDER = "sys/class/powercap"
# A top-level zone. intel-rapl:0:0 is a part of it, intel-rapl-mmio:0 the same counter again.
_ZONE = re.compile(r"intel-rapl:\d+")
_UNIT = "J"
_ALLOW = "allow it until the next boot with: sudo chmod a+r /sys/class/powercap/*/energy_uj"

_Counters = dict[Path, int]


class EnergyMeter:
    """Adds up the energy of every span between ``start`` and ``stop``.

    A span must be shorter than the counter's range, which at the usual 262 kJ lasts some twenty
    minutes at 200 W: a counter that came round more than once cannot be told from one that did not.
    """

    def __init__(self, root: Path = LIVE_ROOT, run: Runner | None = None) -> None:
        """Look for the sensors of the machine below ``root`` whose commands ``run`` runs."""
        self._source = f"{root / _FOLDER}/intel-rapl:*"
        self._fault: str | None = None
        self._total_uj = 0
        self._before: _Counters | None = None
        self._n_spans = 0
        self._zones = self._find_zones(root / _FOLDER)
        self._sampler: PowerSampler | None = None
        if not self._zones and (found := find_power_source(Host.at(root, run))):
            self._sampler = PowerSampler(found)
            self._source = found.name
            self._fault = None
        self._read()  # so that a missing permission is known before anything is measured

    def start(self) -> Self:
        """Begin a span; returns the meter itself."""
        self._before = self._read()
        if self._sampler:
            self._sampler.start()
        return self

    def stop(self) -> Reading:
        """End the span and return the joules of all spans so far.

        Raises:
            RuntimeError: no span was started.
        """
        if self._before is None:
            raise RuntimeError("EnergyMeter.stop() without start()")
        if self._sampler:
            self._sampler.stop()
        for zone, after_uj in self._read().items():
            used_uj = after_uj - self._before.get(zone, after_uj)
            if used_uj < 0:
                used_uj += self._range_uj(zone)
            self._total_uj += used_uj
        self._before = None
        self._n_spans += 1
        return self.joules()

    def joules(self) -> Reading:
        """Return the joules of all finished spans, or why there are none."""
        if self._fault:
            return Reading.unavailable(_UNIT, self._source, self._fault)
        if not self._n_spans:
            return Reading.unavailable(_UNIT, self._source, "nothing was measured yet")
        if self._sampler:
            return self._sampler.joules()
        return Reading.measured(self._total_uj / 1e6, _UNIT, self._source)

    def probe(self) -> Reading:
        """Return joules since an arbitrary moment, or why they are unknown."""
        counters = self._read()
        if self._fault:
            return Reading.unavailable(_UNIT, self._source, self._fault)
        if self._sampler:
            return Reading.measured(0.0, _UNIT, self._source)
        return Reading.measured(sum(counters.values()) / 1e6, _UNIT, self._source)

    def _find_zones(self, folder: Path) -> list[Path]:
        try:
            zones = [
                zone
                for zone in sorted(folder.iterdir())
                if _ZONE.fullmatch(zone.name) and (zone / "name").read_text().startswith("package")
            ]
        except OSError as error:
            self._fault = _fault(error, folder)
            return []
        if not zones:
            self._fault = f"no energy counter of a processor package in {folder}"
        return zones

    def _read(self) -> _Counters:
        """Return each zone's microjoules; none once a zone has failed, a part is no sum."""
        counters: _Counters = {}
        for zone in self._zones:
            file = zone / "energy_uj"
            try:
                counters[zone] = int(file.read_text())
            except (OSError, ValueError) as error:
                self._fault = _fault(error, file)
        return {} if self._fault else counters

    def _range_uj(self, zone: Path) -> int:
        file = zone / "max_energy_range_uj"
        try:
            return int(file.read_text())
        except (OSError, ValueError) as error:
            self._fault = _fault(error, file)
            return 0


def _fault(error: OSError | ValueError, file: Path) -> str:
    if isinstance(error, PermissionError):
        return f"permission denied for {file}; {_ALLOW}"
    if isinstance(error, FileNotFoundError):
        return f"this machine has no {file}"
    return f"cannot read {file}: {error}"
