from dataclasses import replace
from pathlib import Path

import pytest

from edgekd.devices.detect import detect
from edgekd.runtime.conditions import (
    Snapshot,
    judge,
    judge_machine,
    other_load_share,
    take_snapshot,
)

QUIET = Snapshot(
    time_s=0.0,
    temperature_c=50.0,
    frequency_mhz=3000.0,
    governor="performance",
    on_battery=False,
    load_average=0.1,
    cpu_pressure_percent=0.0,
    throttle_events=7,
    swapped_pages=100,
    busy_s=1000.0,
    steal_s=5.0,
    total_s=5000.0,
)
LATER = replace(QUIET, time_s=50.0, busy_s=1091.0, total_s=5100.0)


def _codes(after: Snapshot, own_s: float = 90.0) -> dict[str, bool]:
    return {finding.code: finding.invalid for finding in judge(QUIET, after, own_s)}


def test_a_quiet_machine_gives_no_warning() -> None:
    assert _codes(LATER) == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"throttle_events": 8}, {"throttled": True}),
        ({"swapped_pages": 110}, {"swapping": False}),
        ({"swapped_pages": 5000}, {"swapping": True}),
        ({"busy_s": 1100.0}, {"other-load": False}),
        ({"busy_s": 1130.0}, {"other-load": True}),
        ({"steal_s": 8.0}, {"steal": False}),
        ({"steal_s": 25.0}, {"steal": True}),
        ({"on_battery": True}, {"battery": False}),
        ({"governor": "powersave"}, {"governor": False}),
    ],
)
def test_what_spoils_a_run_is_found_and_weighed(
    changes: dict[str, float], expected: dict[str, bool]
) -> None:
    assert _codes(replace(LATER, **changes)) == expected  # type: ignore[arg-type]


def test_times_of_an_emulator_are_void() -> None:
    machine = detect()
    assert judge_machine(machine) == []
    (finding,) = judge_machine(replace(machine, architecture="aarch64", emulated_on="x86_64"))
    assert (finding.code, finding.invalid) == ("emulated", True)
    assert "aarch64 is emulated on x86_64" in finding.message


def test_what_the_machine_does_not_tell_is_no_warning() -> None:
    blind = replace(
        QUIET,
        throttle_events=None,
        swapped_pages=None,
        busy_s=None,
        steal_s=None,
        total_s=None,
        governor=None,
        on_battery=None,
    )
    assert judge(blind, blind, 1.0) == []
    assert other_load_share(blind, blind, 1.0) is None


def _write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_tree_of_files_is_read(tmp_path: Path) -> None:
    _write(tmp_path, "proc/loadavg", "0.52 0.58 0.59 1/500 1234\n")
    _write(tmp_path, "proc/stat", "cpu  200 100 300 4000 50 20 30 100 10 0\ncpu0 1 2 3\n")
    _write(tmp_path, "proc/vmstat", "nr_free 5\npswpin 3\npswpout 4\n")
    _write(tmp_path, "proc/pressure/cpu", "some avg10=1.50 avg60=0.50 avg300=0.10 total=9\n")
    zone = "sys/class/thermal/thermal_zone"
    _write(tmp_path, f"{zone}0/temp", "47000\n")
    _write(tmp_path, f"{zone}1/temp", "61500\n")
    for number, kilohertz in ((0, 2_000_000), (1, 3_000_000)):
        cpu = f"sys/devices/system/cpu/cpu{number}"
        _write(tmp_path, f"{cpu}/cpufreq/scaling_cur_freq", f"{kilohertz}\n")
        _write(tmp_path, f"{cpu}/thermal_throttle/core_throttle_count", "2\n")
        _write(tmp_path, f"{cpu}/thermal_throttle/package_throttle_count", "3\n")
    _write(tmp_path, "sys/class/hwmon/hwmon3/name", "soctherm_oc\n")
    _write(tmp_path, "sys/class/hwmon/hwmon3/oc1_event_cnt", "4\n")
    found = take_snapshot(tmp_path)
    assert (found.temperature_c, found.frequency_mhz) == (61.5, 2500.0)
    assert (found.throttle_events, found.swapped_pages) == (14, 7)
    assert (found.load_average, found.cpu_pressure_percent) == (0.52, 1.5)
    ticks = 100  # of every Linux that this runs on
    assert found.busy_s == pytest.approx(650 / ticks)
    assert found.steal_s == pytest.approx(100 / ticks)
    assert found.total_s == pytest.approx(4800 / ticks)


def test_an_empty_tree_tells_nothing(tmp_path: Path) -> None:
    found = take_snapshot(tmp_path)
    assert (
        found.temperature_c is found.throttle_events is found.busy_s is found.load_average is None
    )


def test_this_machine_can_be_read() -> None:
    before, after = take_snapshot(), take_snapshot()
    assert after.time_s >= before.time_s
