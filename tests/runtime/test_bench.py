import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgekd.devices.measured import read_bench
from edgekd.errors import EngineError, RecipeError
from edgekd.files import size_of
from edgekd.runtime.bench import BenchRun, BenchSettings, run_bench
from edgekd.runtime.bench_process import describe_end
from edgekd.runtime.bench_runs import is_soaked, is_steady

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schemas/bench-1.json").read_text())
SMALL = BenchSettings(
    prompt_tokens=16,
    decode_tokens=8,
    depths=(0, 24),
    ttft_tokens=(4,),
    repetitions=2,
    n_threads=1,
    cold_start=True,
    roofline=True,
    soak_minutes=0.001,
    warm_up_s=1.0,
)


@pytest.fixture(scope="module")
def run(tiny_gguf: Path, tiny_onnx: Path) -> BenchRun:
    return run_bench([str(tiny_gguf), str(tiny_onnx)], SMALL)


@pytest.fixture(scope="module")
def document(run: BenchRun) -> dict[str, Any]:
    return dict(json.loads(json.dumps(run.as_dict())))


def test_the_document_is_as_the_published_schema_says(document: dict[str, Any]) -> None:
    checker = jsonschema.Draft202012Validator(SCHEMA)
    assert [error.message for error in checker.iter_errors(document)] == []
    document = json.loads(json.dumps(document))
    del document["results"][0]["scenarios"][0]["samples_s"]
    document["results"][1]["memory"]["peak_rss_bytes"]["value"] = None
    assert len(list(checker.iter_errors(document))) == 2


def test_predictions_read_the_document(
    document: dict[str, Any], run: BenchRun, tmp_path: Path
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(document))
    runs = read_bench(file)
    assert [entry.backend for entry in runs] == ["llama.cpp"] * 2 + ["onnxruntime"] * 2
    assert [entry.mean_depth_tokens for entry in runs] == [4, 28, 4, 28]
    assert runs[0].decode_tokens_per_s == run.results[0].decode_tokens_per_s.median


def test_every_engine_gets_the_same_tokens(run: BenchRun) -> None:
    one, other = run.results
    assert [one.engine, other.engine] == ["llama.cpp", "onnxruntime"]
    assert one.vocabulary_sha256 == other.vocabulary_sha256 is not None
    assert one.prompt_ids == other.prompt_ids and len(one.prompt_ids) == 40


def test_every_scenario_has_a_sample_of_every_block(run: BenchRun) -> None:
    names = ["pp4", "pp16", "tg8", "pp16@d24", "tg8@d24"]
    for result in run.results:
        assert [entry.name for entry in result.scenarios] == names
        for entry in result.scenarios:
            assert len(entry.samples_s) == entry.tokens_per_s.n == 2
            assert min(entry.tokens_per_s.samples) > 0


def test_the_gaps_of_a_decode_add_up_to_its_time(run: BenchRun) -> None:
    for entry in (e for result in run.results for e in result.scenarios if e.kind == "decode"):
        assert [len(gaps) for gaps in entry.gaps_s] == [8, 8]
        for gaps, seconds in zip(entry.gaps_s, entry.samples_s, strict=True):
            assert sum(gaps) == pytest.approx(seconds, rel=1e-6)
        assert entry.gap_ms and 0 < entry.gap_ms["p50"] <= entry.gap_ms["p95"]


def test_the_first_token_comes_after_the_prefill(run: BenchRun) -> None:
    for entry in (e for result in run.results for e in result.scenarios if e.kind == "prefill"):
        assert entry.ttft_s
        pairs = zip(entry.ttft_s.samples, entry.samples_s, strict=True)
        assert all(ttft_s >= prefill_s for ttft_s, prefill_s in pairs)


def test_memory_start_and_sizes_are_told_apart(run: BenchRun, tiny_gguf: Path) -> None:
    gguf = run.results[0]
    assert gguf.file_bytes == size_of(tiny_gguf)
    memory = {name: entry["value"] for name, entry in gguf.memory.items()}
    if sys.platform == "linux":
        assert 0 < memory["mapped_weights_bytes"] <= gguf.file_bytes + 2**16
        assert memory["private_bytes"] < memory["resident_bytes"] <= memory["peak_rss_bytes"]
    assert gguf.cold_start and gguf.cold_start["wanted"] == "cold"
    assert gguf.warm_start["cold"] is not True
    for start in (gguf.cold_start, gguf.warm_start):
        steps_s = start["import_s"] + start["load_s"] + start["first_token_s"]
        assert start["process_to_first_token_s"] >= steps_s > 0


def test_energy_is_measured_or_says_why_not(run: BenchRun) -> None:
    for reading in (e.energy_per_token for r in run.results for e in r.scenarios):
        assert reading.unit == "J/token"
        assert (reading.value is None) == (reading.reason is not None)
        assert reading.value != 0


def test_a_result_says_how_near_the_limit_it_came(run: BenchRun) -> None:
    assert run.roofline and run.roofline.read_bytes_per_s.value
    decode = run.results[0].scenarios[2]
    bandwidth = run.roofline.read_bytes_per_s.value
    facts = run.results[0].facts
    assert facts.weight_bytes_per_token.value and facts.kv_bytes_per_token.value
    read = facts.weight_bytes_per_token.value + 4 * facts.kv_bytes_per_token.value
    expected = decode.tokens_per_s.mean * read / bandwidth
    assert decode.roofline_share == pytest.approx(expected)
    assert decode.kv_bytes == 8 * facts.kv_bytes_per_token.value


def test_a_broken_model_fails_with_the_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(EngineError, match=r"broken\.gguf is cut short"):
        run_bench([str(broken)], BenchSettings())


def test_a_context_that_is_too_small_is_refused(tiny_gguf: Path) -> None:
    with pytest.raises(EngineError, match="608 tokens of prompt.* context of 512"):
        run_bench([str(tiny_gguf)], BenchSettings(prompt_tokens=8, decode_tokens=608))


def test_all_faulty_settings_are_named_together() -> None:
    with pytest.raises(RecipeError, match="prompt_tokens is 0.*repetitions is -1.*depths is -2"):
        BenchSettings(prompt_tokens=0, repetitions=-1, depths=(-2,))


def test_a_slowed_model_takes_longer_by_what_it_was_slowed(tiny_gguf: Path) -> None:
    settings = BenchSettings(prompt_tokens=16, decode_tokens=64, repetitions=4, n_threads=1)
    slowed = run_bench([str(tiny_gguf)] * 2, settings, extra_work={1: 3.0})
    times = [min(result.scenarios[1].samples_s) for result in slowed.results]
    assert 2.0 < times[1] / times[0] < 8.0


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_a_crash_is_named_by_its_signal(name: str) -> None:
    program = f"import os, signal; os.kill(os.getpid(), signal.{signal.Signals[name].name})"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    reason = describe_end(child.returncode, child.stderr)
    assert f"killed by {name}" in reason
    assert ("run out of memory" in reason) == (name == "SIGKILL")


def test_only_the_engine_of_the_model_is_imported(tiny_gguf: Path) -> None:
    code = (
        "import sys, time\n"
        "from edgekd.runtime.bench_worker import Worker\n"
        "from edgekd.runtime.bench_settings import BenchSettings\n"
        "settings = BenchSettings(prompt_tokens=8, decode_tokens=4).as_dict()\n"
        f"Worker().answer(dict(do='load', model={str(tiny_gguf)!r}, settings=settings,"
        " cold=False, spawned_s=time.monotonic()))\n"
        "print([n for n in ('torch', 'onnx', 'onnxruntime', 'rich') if n in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_steady_are_runs_that_are_alike() -> None:
    assert not is_steady([1.0, 1.0])
    assert not is_steady([1.0, 0.9, 0.8])
    assert is_steady([5.0, 1.0, 1.02, 1.01])


def test_a_soak_ends_when_neither_speed_nor_heat_change() -> None:
    falling = [100 - n for n in range(8)]
    assert not is_soaked([100.0] * 7, [None] * 7)
    assert not is_soaked(falling, [None] * 8)
    assert is_soaked([*falling, *[90.0] * 8], [None] * 16)
    assert not is_soaked([90.0] * 8, [40.0, 42.0, 44.0, 46.0, 48.0, 50.0, 52.0, 54.0])
