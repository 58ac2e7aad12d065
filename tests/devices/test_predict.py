import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.devices.measured import groups_of, published_groups, read_bench
from edgekd.devices.predict import (
    PRIOR_OVERHEAD_S,
    Point,
    calibrate,
    calibrate_with_spread,
    from_bandwidth,
    leave_one_out,
)
from edgekd.errors import DeviceError

GB = 1e9


def line_points(overhead_s: float, bytes_per_s: float, *sizes: float) -> list[Point]:
    return [Point(size, overhead_s + size / bytes_per_s, "x") for size in sizes]


@given(st.floats(1e9, 5e10), st.lists(st.floats(0.5e9, 8e9), min_size=1, max_size=6))
def test_points_on_the_expected_line_are_met_exactly(rate: float, sizes: list[float]) -> None:
    line = calibrate(line_points(PRIOR_OVERHEAD_S, rate, *sizes))
    assert math.isclose(line.bytes_per_s, rate, rel_tol=1e-3)
    assert math.isclose(line.overhead_s, PRIOR_OVERHEAD_S, rel_tol=0.05)


@given(
    st.lists(st.tuples(st.floats(1e7, 1e10), st.floats(1e-3, 10.0)), min_size=1, max_size=6),
    st.floats(1e6, 1e11),
)
def test_whatever_was_measured_more_bytes_take_longer(
    pairs: list[tuple[float, float]], size: float
) -> None:
    line = calibrate([Point(read, seconds, "x") for read, seconds in pairs])
    assert line.overhead_s >= 0 and line.bytes_per_s > 0
    assert 0 < line.seconds(size) < line.seconds(2 * size)
    low, high = line.interval(size)
    assert low < 1 / line.seconds(size) < high


def test_one_point_leaves_the_overhead_near_what_is_usual() -> None:
    line = calibrate(line_points(0.002, 10 * GB, 1 * GB))
    assert line.overhead_s == pytest.approx(0.002, rel=0.01)


def test_a_fast_token_is_not_mostly_overhead() -> None:
    line = calibrate(line_points(0.0, 20 * GB, 0.06 * GB))  # 3 ms
    assert line.overhead_s < 0.2 * 0.003 * 1.1
    assert line.seconds(0.03 * GB) == pytest.approx(0.0018, rel=0.05)


def test_three_points_with_a_large_overhead_overrule_what_is_usual() -> None:
    line = calibrate(line_points(0.008, 100 * GB, 0.2 * GB, 0.5 * GB, 1 * GB))
    assert 0.005 < line.overhead_s < 0.008


def test_points_of_one_format_are_enough_without_the_others() -> None:
    slow = [Point(b, b / (2 * GB), "q4_0") for b in (0.1 * GB, 0.2 * GB)]
    fast = [Point(b, b / (20 * GB), "f16") for b in (0.1 * GB, 0.2 * GB)]
    line = calibrate([*slow, *fast], "q4_0")
    assert line.n_points == 2
    assert line.seconds(0.15 * GB) == pytest.approx(0.075, rel=0.05)
    assert calibrate([*slow, *fast], "q8_0").n_points == 4


def test_scattered_points_widen_the_interval() -> None:
    tight = calibrate_with_spread(line_points(0.002, 10 * GB, 1 * GB, 2 * GB, 4 * GB))
    assert tight.spread == 0.20
    wild = [Point(1 * GB, 0.04, "x"), Point(2 * GB, 0.5, "x"), Point(4 * GB, 0.2, "x")]
    assert calibrate_with_spread(wild).spread > 0.5


def test_far_outside_what_was_measured_the_interval_is_that_of_a_guess() -> None:
    line = calibrate_with_spread(line_points(0.002, 10 * GB, 1 * GB, 2 * GB, 4 * GB))
    near, far = line.interval(3 * GB), line.interval(0.1 * GB)
    assert near[1] / near[0] == pytest.approx(1.2**2)
    assert far[1] / far[0] == pytest.approx(4.0)


def test_without_any_measurement_the_factor_is_two_both_ways() -> None:
    low, high = from_bandwidth(100 * GB).interval(1 * GB)
    assert high / low == pytest.approx(4.0)


def test_a_left_out_point_is_not_used_to_predict_itself() -> None:
    points = line_points(0.002, 10 * GB, 1 * GB, 2 * GB)
    points.append(Point(3 * GB, 0.604, "x"))  # half of the speed that the others promise
    assert leave_one_out(points)[2] == pytest.approx(0.604 / 0.302 - 1, abs=0.01)


def test_published_speeds_are_predicted_from_each_other() -> None:
    """The claim in docs/devices.md; benchmarks/predictor.py prints every error."""
    errors = sorted(abs(e) for group in published_groups() for e in leave_one_out(group.points))
    assert len(errors) >= 30
    assert errors[len(errors) // 2] <= 0.06
    assert errors[int(0.9 * (len(errors) - 1))] <= 0.20


def test_bytes_of_a_public_model_are_those_of_its_file() -> None:
    """Llama 3.1 8B as Q4_K_M is 4.92 GB, of which the embedding's 0.2955 GB are not read."""
    (group,) = groups_of("amd-strix-halo")
    size = next(
        p.read_bytes for p, m in zip(group.points, group.models, strict=True) if m.endswith("8b")
    )
    assert size == pytest.approx(4.92e9 - 0.2955e9, rel=0.005)


def bench_line(**changes: object) -> dict[str, object]:
    speed = {"samples": [9.0, 10.0, 12.0]}
    settings = {"prompt_tokens": 32, "decode_tokens": 64}
    run: dict[str, object] = {"model": "m.gguf", "engine": "llama.cpp", "settings": settings}
    return (
        run | {"decode_tokens_per_s": speed, "prefill_tokens_per_s": speed, "load_s": 1} | changes
    )


def test_own_runs_are_read_with_their_median_and_depth(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps([bench_line()]))
    (run,) = read_bench(file)
    assert (run.decode_tokens_per_s, run.mean_depth_tokens, run.backend) == (
        10.0,
        64.0,
        "llama.cpp",
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[3]",
        "{}",
        '{"results": 3}',
        json.dumps([bench_line(decode_tokens_per_s={"samples": []})]),
    ]
    + [json.dumps([bench_line(decode_tokens_per_s={"samples": [0.0]})])],
)
def test_what_is_no_bench_output_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(DeviceError, match="no output of 'edgekd bench"):
        read_bench(file)
    with pytest.raises(DeviceError, match="cannot read"):
        read_bench(tmp_path / "none")
