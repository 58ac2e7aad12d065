"""Whole machines, replayed: what they are, and what they measure."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekd.devices.android import over_adb
from edgekd.devices.battery import battery_power
from edgekd.devices.detect import detect, detect_phone
from edgekd.devices.energy import EnergyMeter
from edgekd.devices.host import replay
from edgekd.devices.sensors import Sensors, read_phone_sensors, read_sensors
from tests.devices.replayed import plant, read_fixture, replayed_host

PHONE = "192.168.1.7:5555"


def sensors_of(name: str, root: Path) -> Sensors:
    return read_sensors(replayed_host(name, root))


@pytest.mark.parametrize(
    ("name", "device", "mode", "firmware", "cores"),
    [
        ("orin_nano_jp6", "jetson-orin-nano-super", "25W", "R36.4.3", 6),
        ("orin_r39", "jetson-orin-nano-super", "MAXN_SUPER", "R39.2", 6),
        ("agx_orin", "jetson-agx-orin-64gb", "MAXN", "R36.4.7", 12),
        ("thor", "jetson-agx-thor", "MAXN", "R38.2.0", 14),
        ("pi5", "raspberry-pi-5", None, None, 4),
        ("pi4", None, None, None, 4),
        ("lunar_lake", "intel-lunar-lake", "balanced", None, 8),
        ("strix_halo", "amd-strix-halo", "performance", None, 32),
        ("mac_m4", "apple-m4", None, None, 1),
        ("server_rtx", None, None, None, 1),
    ],
)
def test_a_machine_is_recognized(
    name: str,
    device: str | None,
    mode: str | None,
    firmware: str | None,
    cores: int,
    tmp_path: Path,
) -> None:
    host = replayed_host(name, tmp_path)
    machine = detect(host.root, host.run)
    assert (machine.device, machine.power_mode, machine.firmware) == (device, mode, firmware)
    assert machine.n_usable_cores == cores


def test_a_phone_is_recognized_over_adb() -> None:
    machine = detect_phone(over_adb(replay(read_fixture("snapdragon_phone").replies), PHONE))
    assert (machine.soc_model, machine.device) == ("SM8850", "snapdragon-8-elite-gen-5")
    assert (machine.system, machine.n_usable_cores) == ("Android 16", 8)
    assert machine.memory_bytes == 15583232 * 1024
    assert "i8mm" in (machine.instruction_sets or ())


def test_accelerators_are_named(tmp_path: Path) -> None:
    for name, npu in (("lunar_lake", "Intel NPU (Lunar Lake)"), ("strix_halo", "AMD XDNA 2")):
        host = replayed_host(name, tmp_path / name)
        assert detect(host.root, host.run).npus == (npu,)


def test_memory_of_a_mac_and_of_an_orin_is_the_systems(tmp_path: Path) -> None:
    for name, size in (("mac_m4", 17179869184), ("orin_nano_jp6", 7802912 * 1024)):
        host = replayed_host(name, tmp_path / name)
        assert detect(host.root, host.run).memory_bytes == size


def test_orin_nano_has_a_rail_of_the_whole_module(tmp_path: Path) -> None:
    sensors = sensors_of("orin_nano_jp6", tmp_path)
    assert sensors.power.value == pytest.approx(4.984 * 1.856)
    assert sensors.power.status == "measured"
    # NC is not connected, channel 7 is no rail; nvidia-smi tells nothing here.
    assert set(sensors.rails) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC", "gpu 0"}
    assert sensors.rails["gpu 0"].value is None
    assert sensors.temperatures["tj-thermal"].value == 44.531
    # A unit that is switched off says -256.
    assert sensors.temperatures["cv0-thermal"].value is None
    assert sensors.throttling["average over-current events"].value == 3


def test_tegrastats_stands_in_where_rails_are_no_files(tmp_path: Path) -> None:
    sensors = sensors_of("orin_r39", tmp_path)
    assert (sensors.power.value, sensors.power.source) == (9.761, "tegrastats")
    assert sensors.rails["VDD_SOC"].value == 1.8


def test_agx_orin_has_no_whole_rail_and_says_so(tmp_path: Path) -> None:
    sensors = sensors_of("agx_orin", tmp_path)
    # The negative rail counts nothing, the one without a current is missing.
    assert sensors.power.value == pytest.approx(19.984 * 0.240 + 4.968 * 0.816)
    assert sensors.power.status == "estimated"
    assert "no rail feeds the whole board" in (sensors.power.reason or "")
    assert sensors.rails["VDD_CPU_CV"].value == pytest.approx(-0.159872)
    missing = sensors.rails["VDDQ_VDD2_1V8AO"]
    assert missing.value is None and "cannot read" in (missing.reason or "")


def test_thor_has_a_whole_rail_on_its_second_monitor(tmp_path: Path) -> None:
    sensors = sensors_of("thor", tmp_path)
    assert sensors.power.value == pytest.approx(19.968 * 1.640)
    assert sensors.rails["VDD_GPU"].value == pytest.approx(-0.319744)


def test_pi5_estimates_from_its_supply_chip(tmp_path: Path) -> None:
    sensors = sensors_of("pi5", tmp_path)
    rails_w = 0.05 * 3.7 + 2.5 * 0.8
    assert sensors.power.value == pytest.approx(rails_w * 1.1451 + 0.5879)
    assert sensors.power.status == "estimated"
    assert sensors.throttling["under-voltage now"].value == 1
    assert sensors.throttling["frequency capped now"].value == 0
    assert sensors.throttling["throttled since start"].value == 1
    assert sensors.temperatures["firmware"].value == 61.5


def test_pi4_has_no_power_sensor_and_gives_the_reason(tmp_path: Path) -> None:
    sensors = sensors_of("pi4", tmp_path)
    assert sensors.power.value is None
    assert "Command not registered" in (sensors.power.reason or "")
    assert all(flag.value == 0 for flag in sensors.throttling.values())


def test_a_laptop_on_battery_measures_all_it_uses(tmp_path: Path) -> None:
    sensors = sensors_of("lunar_lake", tmp_path)
    assert (sensors.power.value, sensors.power.status) == (12.45, "measured")
    assert sensors.throttling["core throttling"].value == 3
    assert sensors.throttling["package throttling"].value == 5
    assert sensors.temperatures["x86_pkg_temp"].value == 47.0
    assert sensors.temperatures["iwlwifi_1"].value is None


def test_a_plugged_laptop_measures_its_package_only(tmp_path: Path) -> None:
    sensors = sensors_of("strix_halo", tmp_path)
    assert sensors.power.value == 28.041
    assert "power1_average" in sensors.power.source
    assert sensors.temperatures["k10temp Tctl"].value == 52.125
    assert sensors.throttling["throttling"].value is None


def test_a_full_battery_tells_nothing_about_the_machine(tmp_path: Path) -> None:
    reading = battery_power(replayed_host("strix_halo", tmp_path))
    assert reading.value is None and "plugged in" in (reading.reason or "")


def test_a_measured_part_goes_before_an_estimated_whole(tmp_path: Path) -> None:
    host = replayed_host("strix_halo", tmp_path)
    battery = "sys/class/power_supply/BAT0/"
    # A driver that gives milliamperes where microamperes belong.
    plant(tmp_path, {f"{battery}status": "Discharging", f"{battery}current_now": "2200"})
    assert battery_power(host).status == "estimated"
    assert (read_sensors(host).power.value, read_sensors(host).power.status) == (28.041, "measured")


def test_a_phone_is_measured_only_while_unplugged() -> None:
    replies = read_fixture("snapdragon_phone").replies
    sensors = read_phone_sensors(over_adb(replay(replies), PHONE))
    assert sensors.power.value == pytest.approx(4.211 * 1.18)
    assert sensors.throttling["thermal status"].value == 1
    assert sensors.temperatures["skin"].value == 33.9
    assert sensors.temperatures["battery"].value == 31.2
    plugged = read_fixture("snapdragon_plugged").replies
    reading = read_phone_sensors(over_adb(replay(plugged), PHONE)).power
    assert reading.value is None and "unplug it" in (reading.reason or "")


def test_a_phone_that_tells_milliamperes_is_an_estimate() -> None:
    replies = dict(read_fixture("snapdragon_phone").replies)
    path = f"adb -s {PHONE} shell cat /sys/class/power_supply/battery/current_now"
    reading = read_phone_sensors(over_adb(replay(replies | {path: "1180\n"}), PHONE)).power
    assert reading.value == pytest.approx(4.211 * 1.18)
    assert reading.status == "estimated"


def test_a_mac_needs_root_for_power(tmp_path: Path) -> None:
    assert sensors_of("mac_m4", tmp_path).power.value == 1.345
    host = replayed_host("mac_m4", tmp_path)
    command = next(key for key in read_fixture("mac_m4").replies if "powermetrics" in key)
    refusal = "powermetrics must be invoked as the superuser\n"
    replies = read_fixture("mac_m4").replies | {command: refusal}
    power = read_sensors(type(host)(host.root, replay(replies))).power
    assert power.value is None and "superuser" in (power.reason or "")


def test_a_graphics_card_tells_power_and_throttling(tmp_path: Path) -> None:
    sensors = sensors_of("server_rtx", tmp_path)
    assert sensors.power.value == 61.52
    assert sensors.throttling["gpu 0"].value == 4  # SwPowerCap


def test_an_empty_machine_has_a_reason_for_everything(tmp_path: Path) -> None:
    sensors = read_sensors(replayed_host("orin_r39", tmp_path / "a").at(tmp_path / "b"))
    assert sensors.power.value is None and sensors.power.reason
    assert [r.value for r in sensors.throttling.values()] == [None]


@pytest.fixture
def public_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_laptops_secret_counter_is_refused_to_an_ordinary_user(public_folder: Path) -> None:
    fixture = read_fixture("lunar_lake")
    plant(public_folder, fixture.files)
    for path in fixture.secret:
        (public_folder / path).chmod(0o400)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    else:
        for path in fixture.secret:
            (public_folder / path).chmod(0)
    try:
        reading = EnergyMeter(public_folder).start().stop()
    finally:
        os.seteuid(user)
    assert reading.value is None
    assert "permission denied" in (reading.reason or "")


def test_a_laptops_counter_wraps_and_goes_on(tmp_path: Path) -> None:
    fixture = read_fixture("lunar_lake")
    plant(tmp_path, fixture.files)
    meter = EnergyMeter(tmp_path).start()
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("1999150\n")
    assert meter.stop().value == 2.0


def test_a_board_without_counters_sums_its_watts_over_time(tmp_path: Path) -> None:
    host = replayed_host("orin_nano_jp6", tmp_path)
    meter = EnergyMeter(host.root, host.run)
    assert meter.probe().status == "measured"
    reading = meter.start().stop()
    assert reading.status == "estimated" and reading.value is not None
    assert 0 < reading.value < 9.25  # 9.25 W for far less than a second
    (tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/curr1_input").unlink()
    for channel in (2, 3):
        (tmp_path / f"sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/curr{channel}_input").unlink()
    gone = meter.start().stop()
    assert gone.value is None and gone.reason
