"""Parsers of what sensors and programs say: any text gives a value or nothing, never an error."""

import math

from hypothesis import given
from hypothesis import strategies as st

from edgekd.devices.android import parse_battery, parse_properties
from edgekd.devices.battery import power_from_current
from edgekd.devices.host import parse_int
from edgekd.devices.nvidia import parse_gpu
from edgekd.devices.power_sampling import integrate
from edgekd.devices.processors import instruction_sets, processor_name
from edgekd.devices.raspberry import parse_pmic
from edgekd.devices.tegrastats import parse_tegrastats

JETPACK = (
    "09-21-2025 15:38:17 RAM 3645/7620MB (lfb 63x4MB) SWAP 236/3810MB (cached 0MB) CPU "
    "[1%@729,0%@729,0%@729,0%@729,0%@729,0%@729] EMC_FREQ 0%@204 GR3D_FREQ 0%@[305] "
    "cpu@44.125C soc2@43.6C tj@44.531C VDD_IN 2957mW/2957mW VDD_CPU_GPU_CV 486mW/486mW "
    "VDD_SOC 1012mW/1012mW"
)
R39 = "RAM 1/2MB GR3D_FREQ 12%@[1300,1300] cpu@50C/50C VDD_IN 9761mW/9760mW/9762mW"
THOR = "RAM 9/122000MB GR3D_FREQ @[1000,1000,1010] tj@40.5C VDD_GPU -16mW/-8mW VIN 32000mW/31000mW"

WATTS = st.integers(-99_999, 99_999)
NAMES = st.from_regex(r"[A-Z][A-Z0-9_]{0,14}", fullmatch=True).filter(lambda n: n != "RAM")


def test_the_shape_of_jetpack_5_and_6() -> None:
    stats = parse_tegrastats(JETPACK)
    assert (stats.memory_used_bytes, stats.memory_bytes) == (3645 * 2**20, 7620 * 2**20)
    assert (stats.gpu_percent, stats.gpu_frequency_hz) == (0, 305_000_000)
    assert stats.temperatures_c == {"cpu": 44.125, "soc2": 43.6, "tj": 44.531}
    assert stats.rails_w == {"VDD_IN": 2.957, "VDD_CPU_GPU_CV": 0.486, "VDD_SOC": 1.012}


def test_the_shapes_of_l4t_39_and_of_thor() -> None:
    stats = parse_tegrastats(R39)
    assert (stats.gpu_percent, stats.gpu_frequency_hz) == (12, 1_300_000_000)
    assert (stats.temperatures_c, stats.rails_w) == ({"cpu": 50.0}, {"VDD_IN": 9.761})
    stats = parse_tegrastats(THOR)
    assert (stats.gpu_percent, stats.gpu_frequency_hz) == (None, 1_010_000_000)
    assert stats.rails_w == {"VDD_GPU": -0.016, "VIN": 32.0}


def test_a_unit_that_is_off_has_no_temperature() -> None:
    assert parse_tegrastats("cv0@-256C cpu@-2.5C").temperatures_c == {"cpu": -2.5}


@given(st.dictionaries(NAMES, WATTS, max_size=6), st.integers(1, 3))
def test_every_rail_comes_back_with_its_present_power(rails: dict[str, int], n: int) -> None:
    parts = [f"{name} {'/'.join([f'{milliwatts}mW'] * n)}" for name, milliwatts in rails.items()]
    found = parse_tegrastats("RAM 1/2MB " + " ".join(parts)).rails_w
    assert found == {name: milliwatts / 1e3 for name, milliwatts in rails.items()}


@given(st.text())
def test_any_text_is_survived(text: str) -> None:
    parse_tegrastats(text)
    parse_properties(text)
    parse_battery(text)
    instruction_sets(text)
    processor_name(text)
    assert all(math.isfinite(watts) and watts >= 0 for watts in parse_pmic(text).values())
    number = parse_int(text)
    assert number is None or isinstance(number, int)


@given(st.text(alphabet="0123456789.,-xAFnaif[]/ ", max_size=80))
def test_a_line_of_nvidia_smi_gives_finite_values_or_reasons(text: str) -> None:
    found = parse_gpu(text)
    if found:
        for reading in (found[1].power, found[1].temperature, found[1].throttling):
            assert (reading.value is None) == (reading.reason is not None)
            assert reading.value is None or math.isfinite(reading.value)


@given(st.dictionaries(NAMES, st.tuples(st.floats(0, 999), st.floats(0, 999)), max_size=5))
def test_rails_of_a_pi_are_volts_times_amperes(rails: dict[str, tuple[float, float]]) -> None:
    lines = [f" {n}_A current(1)={a:.8f}A\n {n}_V volt(2)={v:.8f}V" for n, (a, v) in rails.items()]
    found = parse_pmic("\n".join(lines))
    assert set(found) == set(rails)
    for name, (amperes, volts) in rails.items():
        assert math.isclose(found[name], amperes * volts, rel_tol=1e-4, abs_tol=1e-4)


def test_a_rail_that_says_nan_or_only_one_half_is_left_out() -> None:
    text = "A_A current(0)=nanA\nA_V volt(0)=1.0V\nB_A current(1)=1.0A\nC_V volt(2)=3.0V\n"
    assert parse_pmic(text) == {}


@given(st.integers(10_000, 20_000_000), st.integers(1, 30_000_000), st.booleans())
def test_a_discharge_counts_whatever_its_sign(current_ua: int, voltage_uv: int, sign: bool) -> None:
    reading = power_from_current(voltage_uv, -current_ua if sign else current_ua, "x")
    assert reading.status == "measured"
    assert math.isclose(reading.value or 0, current_ua * voltage_uv / 1e12)


@given(st.floats(0, 500), st.lists(st.floats(0.01, 10), min_size=1, max_size=9))
def test_constant_power_gives_power_times_time(watts: float, steps_s: list[float]) -> None:
    times = [sum(steps_s[:i]) for i in range(len(steps_s) + 1)]
    joules = integrate([(t, watts) for t in times])
    assert math.isclose(joules, watts * times[-1], rel_tol=1e-9, abs_tol=1e-9)


def test_changing_power_is_summed_by_trapezoids() -> None:
    assert integrate([(0.0, 0.0), (1.0, 10.0), (3.0, 10.0)]) == 25.0
    assert integrate([(0.0, 7.0)]) == 0.0
