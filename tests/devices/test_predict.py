import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.devices.measured import groups_of, published_groups, read_bench
from edgekd.devices.predict import (
    Point,
    calibrate,
    calibrate_with_spread,
    from_bandwidth,
    leave_one_out,
)
from edgekd.errors import DeviceError

GB = 1e9


def line_points(layer_s: float, bytes_per_s: float, *sizes: float) -> list[Point]:
    """Points of models with 30 layers."""
    return [Point(size, 30 * layer_s + size / bytes_per_s, "x", 30) for size in sizes]


@given(st.floats(1e9, 5e10), st.lists(st.floats(0.5e9, 8e9), min_size=2, max_size=6))
def test_a_measured_point_is_met_again(rate: float, sizes: list[float]) -> None:
    points = line_points(0.1 * min(sizes) / rate / 30, rate, *sizes)
    line = calibrate(points)
    for point in points:
        assert math.isclose(line.seconds(point.read_bytes, 30), point.seconds, rel_tol=0.05)


@given(
    st.lists(
        st.tuples(st.floats(1e7, 1e10), st.floats(1e-3, 10.0), st.integers(1, 100)),
        min_size=1,
        max_size=6,
    ),
    st.floats(1e6, 1e11),
    st.integers(1, 100),
)
def test_whatever_was_measured_more_bytes_and_layers_take_longer(
    rows: list[tuple[float, float, int]], size: float, layers: int
) -> None:
    line = calibrate([Point(read, seconds, "x", n) for read, seconds, n in rows])
    assert line.layer_s > 0 and line.bytes_per_s > 0
    assert sum(k.weight for k in line.lines) == pytest.approx(1)
    assert 0 < line.seconds(size, layers) < line.seconds(2 * size, layers)
    assert line.seconds(size, layers) < line.seconds(size, 2 * layers)
    low, high = line.interval(size, layers)
    assert low < 1 / line.seconds(size, layers) < high


def test_one_point_leaves_the_cost_of_layers_at_what_is_usual() -> None:
    (point,) = points = line_points(0.0, 10 * GB, 1 * GB)
    line = calibrate(points)
    assert line.seconds(point.read_bytes, 30) == pytest.approx(point.seconds, rel=0.01)
    half = line.seconds(0.5 * GB, 30) / point.seconds
    assert 0.55 < half < 0.65  # somewhat more than half: a layer costs something


def test_points_with_costly_layers_overrule_what_is_usual() -> None:
    line = calibrate(line_points(0.5e-3, 50 * GB, 0.2 * GB, 0.5 * GB, 1 * GB))
    assert line.layer_s == pytest.approx(0.5e-3, rel=0.1)
    assert line.bytes_per_s == pytest.approx(50 * GB, rel=0.1)


def test_layers_tell_a_deep_model_from_a_broad_one_of_the_same_size() -> None:
    points = [Point(b * GB, n * 1e-3 + b / 50, "x", n) for b, n in ((0.5, 16), (1.5, 28), (4, 32))]
    line = calibrate(points)
    deep, broad = (line.seconds(1 * GB, n) for n in (40, 10))
    assert deep == pytest.approx(0.060, rel=0.05)
    assert broad == pytest.approx(0.030, rel=0.1)


def test_points_of_one_format_are_enough_without_the_others() -> None:
    slow = [Point(b, b / (2 * GB), "q4_0", 30) for b in (0.1 * GB, 0.2 * GB)]
    fast = [Point(b, b / (20 * GB), "f16", 30) for b in (0.1 * GB, 0.2 * GB)]
    line = calibrate([*slow, *fast], "q4_0")
    assert line.n_points == 2
    assert line.seconds(0.15 * GB, 30) == pytest.approx(0.075, rel=0.05)
    assert calibrate([*slow, *fast], "q8_0").n_points == 4


def test_scattered_points_widen_the_interval() -> None:
    tight = calibrate_with_spread(line_points(0.0001, 10 * GB, 1 * GB, 2 * GB, 4 * GB))
    assert tight.spread == 0.20
    wild = [Point(b * GB, seconds, "x", 30) for b, seconds in ((1, 0.04), (2, 0.5), (4, 0.2))]
    assert calibrate_with_spread(wild).spread > 0.5


def test_far_outside_what_was_measured_the_interval_is_that_of_a_guess() -> None:
    line = calibrate_with_spread(line_points(0.0001, 10 * GB, 1 * GB, 2 * GB, 4 * GB))
    near, far = line.interval(3 * GB, 30), line.interval(0.1 * GB, 30)
    assert near[1] / near[0] == pytest.approx(1.2**2)
    assert far[1] / far[0] == pytest.approx(4.0)


def test_without_any_measurement_the_factor_is_two_both_ways() -> None:
    low, high = from_bandwidth(100 * GB).interval(1 * GB, 28)
    assert high / low == pytest.approx(4.0)


def test_a_left_out_point_is_not_used_to_predict_itself() -> None:
    points = line_points(0.0003, 10 * GB, 1 * GB, 2 * GB)
    points.append(Point(3 * GB, 0.618, "x", 30))  # half of the speed that the others promise
    assert leave_one_out(points)[2] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("is_survey", [True, False])
def test_published_speeds_are_predicted_from_each_other(is_survey: bool) -> None:
    """The claim in docs/devices.md; benchmarks/predictor.py prints every error."""
    groups = [group for group in published_groups() if group.in_survey or not is_survey]
    errors = sorted(abs(e) for group in groups for e in leave_one_out(group.points))
    assert len(errors) == (27 if is_survey else 44)
    assert errors[len(errors) // 2] <= 0.06
    assert errors[math.ceil(0.9 * (len(errors) - 1))] <= 0.20


def test_bytes_of_a_public_model_are_those_of_its_file() -> None:
    """Llama 3.1 8B as Q4_K_M is 4.92 GB, of which the embedding's 0.2955 GB are not read."""
    (group,) = groups_of("amd-strix-halo")
    size = next(
        p.read_bytes for p, m in zip(group.points, group.models, strict=True) if m.endswith("8b")
    )
    assert size == pytest.approx(4.92e9 - 0.2955e9, rel=0.005)


def scenario(kind: str, median: float, n_depth: int = 0) -> dict[str, object]:
    return {"kind": kind, "n_tokens": 64, "n_depth": n_depth, "tokens_per_s": {"median": median}}


def bench_document(*decodes: dict[str, object], **machine: str) -> str:
    result = {
        "model": "m.gguf",
        "engine": "llama.cpp",
        "warm_start": {"load_s": 1},
        "scenarios": [scenario("prefill", 99.0), *decodes],
    }
    return json.dumps({"machine": machine, "results": [result]})


def test_own_runs_are_read_with_their_median_at_every_depth(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(bench_document(scenario("decode", 10.0), scenario("decode", 7.0, 512)))
    first, second = read_bench(file)
    assert (first.decode_tokens_per_s, first.mean_depth_tokens) == (10.0, 32.0)
    assert (second.decode_tokens_per_s, second.mean_depth_tokens) == (7.0, 544.0)
    assert (first.backend, first.prefill_tokens_per_s, first.load_s) == ("llama.cpp", 99.0, 1.0)


def test_times_of_an_emulator_predict_nothing(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(bench_document(scenario("decode", 10.0), emulated_on="x86_64"))
    with pytest.raises(DeviceError, match="emulator on x86_64.*on the device itself"):
        read_bench(file)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[3]",
        "{}",
        '{"results": 3}',
        '{"machine": {}, "results": [{"scenarios": []}]}',
        bench_document(scenario("decode", 0.0)),
        bench_document().replace("prefill", "decode"),
    ],
)
def test_what_is_no_bench_output_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(DeviceError, match="no output of 'edgekd bench"):
        read_bench(file)
    with pytest.raises(DeviceError, match="cannot read"):
        read_bench(tmp_path / "none")
