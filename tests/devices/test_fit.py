import pytest

from edgekd.devices.fit import FitReport, Target, Wish, fit, target_of
from edgekd.devices.measured import OwnRun, groups_of
from edgekd.devices.spec import find_spec
from edgekd.devices.workload import QUANT_BITS, Workload, quant_bits
from edgekd.errors import DeviceError

MODEL = Workload(
    name="m",
    format="F16",
    n_body=900_000_000,
    n_head=100_000_000,
    n_embedding=0,
    n_small=0,
    stored_bytes=2_000_000_000,
    read_bytes=2_000_000_000,
    kv_bytes_per_token=50_000,
    vocab_size=50_000,
    n_layers=28,
)
BOARD = Target(
    name="board",
    memory_bytes=4e9,
    memory_note="",
    bandwidth_bytes_per_s=20e9,
    bandwidth_share=1.0,
    bandwidth_source="",
)


def report_of(target: Target = BOARD, model: Workload = MODEL, **wish: float) -> FitReport:
    return fit(model, target, Wish(**{"context_tokens": 1000, **wish}))  # type: ignore[arg-type]


def run(speed: float, backend: str = "llama.cpp", load_s: float = 1.0) -> OwnRun:
    return OwnRun(
        model="m",
        backend=backend,
        mean_depth_tokens=0,
        decode_tokens_per_s=speed,
        prefill_tokens_per_s=10 * speed,
        load_s=load_s,
    )


def test_memory_is_weights_and_cache_and_engine() -> None:
    report = report_of()
    assert (report.weights_bytes, report.kv_cache_bytes) == (2_000_000_000, 50_000_000)
    parts = report.weights_bytes + report.kv_cache_bytes + report.overhead_bytes
    assert report.needed_bytes == parts
    assert report.fits is True


def test_a_long_context_alone_can_be_too_much() -> None:
    assert report_of(context_tokens=60_000).fits is False


def test_a_wish_for_memory_replaces_what_there_is() -> None:
    assert report_of(memory_bytes=1e9).fits is False
    assert report_of(memory_bytes=9e9).fits is True


def test_a_device_of_unknown_memory_neither_fits_nor_not() -> None:
    target = target_of(find_spec("apple-a17-pro"), [])
    report = report_of(target)
    assert report.fits is None and report.available_note
    assert report.predictions[0].decode.value is None
    assert report.predictions[0].decode.reason


def test_half_of_the_context_is_read_with_every_token() -> None:
    (prediction,) = report_of().predictions
    expected_s = 0.002 + (2e9 + 500 * 50_000) / 20e9
    assert prediction.decode.value == pytest.approx(1 / expected_s)
    assert prediction.basis == "bandwidth alone"
    assert prediction.prefill.value is None and prediction.prefill.reason


def test_published_runs_of_the_device_go_before_its_bandwidth() -> None:
    target = target_of(find_spec("raspberry-pi-5"), groups_of("raspberry-pi-5"))
    bases = {prediction.basis for prediction in report_of(target).predictions}
    assert bases == {"published measurements"}


def test_own_runs_go_before_published_ones_and_tell_prefill_and_load() -> None:
    target = target_of(find_spec("raspberry-pi-5"), groups_of("raspberry-pi-5"))
    twice = MODEL.in_quant("q8_0")
    own = [(run(5.0, load_s=2.0), MODEL), (run(9.0, load_s=1.0), twice)]
    report = fit(MODEL, target, Wish(context_tokens=1), own)
    first = report.predictions[0]
    assert first.basis == "own measurements" and len(report.predictions) > 1
    assert first.decode.value == pytest.approx(5.0, rel=0.1)
    assert first.prefill.value == pytest.approx(50.0)
    assert first.load.value == pytest.approx(2.0)
    # The published runs promise other speeds; the options follow the own ones.
    speeds = {option.quant: option.decode_tokens_per_s for option in report.options}
    assert speeds["f16"] == pytest.approx(first.decode.value, rel=0.01)


def test_options_that_meet_the_wish_are_the_fast_and_small_ones() -> None:
    report = report_of(tokens_per_s=20.0)
    met = {option.quant for option in report.options if option.meets}
    assert "q4_0" in met and "f16" not in met
    for option in report.options:
        assert option.meets == ((option.decode_tokens_per_s or 0) >= 20.0)


def test_the_largest_student_meets_the_wish_and_a_larger_one_would_not() -> None:
    wish = Wish(context_tokens=1000, tokens_per_s=60.0)
    student = fit(MODEL, BOARD, wish).largest_student
    assert student is not None and student.meets
    assert student.n_weights < MODEL.n_weights
    assert student.decode_tokens_per_s == pytest.approx(60.0, rel=0.01)


def test_no_student_meets_a_wish_that_head_and_overhead_alone_break() -> None:
    assert report_of(tokens_per_s=501.0).largest_student is None


def test_a_model_that_meets_the_wish_needs_no_smaller_student() -> None:
    student = report_of(tokens_per_s=1.0).largest_student
    assert student is not None and student.n_weights == MODEL.n_weights


def test_quantizing_changes_bytes_by_the_bits() -> None:
    small = MODEL.in_quant("int4")
    assert small.stored_bytes == 900_000_000 * 4.5 / 8 + 100_000_000 * 8.5 / 8
    assert small.read_bytes == small.stored_bytes
    assert quant_bits("INT8") == ("q8_0", QUANT_BITS["q8_0"])
    with pytest.raises(DeviceError, match="choose one of f32"):
        MODEL.in_quant("q3_0")


def test_half_of_the_layers_take_half_of_the_body() -> None:
    half = MODEL.in_quant("q4_0").scaled(0.5)
    assert half.stored_bytes == pytest.approx(450_000_000 * 4.5 / 8 + 100_000_000 * 8.5 / 8)
    assert half.kv_bytes_per_token == 25_000
