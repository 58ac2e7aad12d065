import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekd.devices.energy import EnergyMeter

FOLDER = "sys/class/powercap"


def set_zone(root: Path, zone: str, name: str, energy_uj: int) -> Path:
    folder = root / FOLDER / zone
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text("262143328850\n")
    return folder


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that any user may enter; read by an ordinary one, since root may read all."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def ordinary_user(public_folder: Path) -> Iterator[None]:
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_packages_are_summed_and_their_parts_left_out(tmp_path: Path) -> None:
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys",
        "intel-rapl:0:0": "core",
        "intel-rapl-mmio:0": "package-0",
    }
    for zone, name in zones.items():
        set_zone(tmp_path, zone, name, 1_000_000)
    meter = EnergyMeter(tmp_path).start()
    for zone, name in zones.items():
        set_zone(tmp_path, zone, name, 2_500_000)
    assert meter.stop().value == 3.0
    assert (meter.joules().unit, meter.joules().status) == ("J", "measured")


def test_a_counter_that_wraps_around_goes_on(tmp_path: Path) -> None:
    set_zone(tmp_path, "intel-rapl:0", "package-0", 262_143_000_000)
    meter = EnergyMeter(tmp_path).start()
    set_zone(tmp_path, "intel-rapl:0", "package-0", 671_150)
    assert meter.stop().value == 1.0


def test_spans_add_up_and_what_lies_between_them_does_not_count(tmp_path: Path) -> None:
    meter = None
    for before_uj, after_uj in ((0, 1_000_000), (5_000_000, 7_000_000)):
        set_zone(tmp_path, "intel-rapl:0", "package-0", before_uj)
        meter = (meter or EnergyMeter(tmp_path)).start()
        set_zone(tmp_path, "intel-rapl:0", "package-0", after_uj)
        meter.stop()
    assert meter is not None
    assert meter.joules().value == 3.0


def test_a_machine_without_counters_gives_a_reason_and_no_number(tmp_path: Path) -> None:
    meter = EnergyMeter(tmp_path).start()
    reading = meter.stop()
    assert (reading.value, reading.status) == (None, "unavailable")
    assert "this machine has no" in (reading.reason or "")
    set_zone(tmp_path, "intel-rapl:0", "psys", 5)
    assert "no energy counter of a processor package" in (
        EnergyMeter(tmp_path).probe().reason or ""
    )


def test_a_counter_that_cannot_be_read_is_not_left_out_of_the_sum(tmp_path: Path) -> None:
    set_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (set_zone(tmp_path, "intel-rapl:1", "package-1", 1) / "energy_uj").write_text("many\n")
    reading = EnergyMeter(tmp_path).start().stop()
    assert reading.value is None
    assert "cannot read" in (reading.reason or "")


def test_a_forbidden_counter_says_how_to_allow_it(
    public_folder: Path, request: pytest.FixtureRequest
) -> None:
    (set_zone(public_folder, "intel-rapl:0", "package-0", 1) / "energy_uj").chmod(0)
    request.getfixturevalue("ordinary_user")
    reading = EnergyMeter(public_folder).start().stop()
    assert reading.value is None
    assert "permission denied" in (reading.reason or "")
    assert "chmod a+r" in (reading.reason or "")


def test_stop_without_start_is_a_fault_of_the_program(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="without start"):
        EnergyMeter(tmp_path).stop()


def test_this_machine_is_measured_or_says_why_not() -> None:
    reading = EnergyMeter().start().stop()
    assert (reading.value is None) == (reading.status == "unavailable")
    assert (reading.value is None) == (reading.reason is not None)
