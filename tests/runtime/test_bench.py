import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from edgekd.errors import EngineError, RecipeError
from edgekd.files import size_of
from edgekd.runtime.bench import (
    BenchResult,
    BenchSettings,
    bench_models,
    describe_end,
    result_from_dict,
)
from edgekd.runtime.bench_table import render_table

SMALL = BenchSettings(prompt_tokens=16, decode_tokens=8, repetitions=2, n_threads=1)


@pytest.fixture(scope="module")
def results(tiny_gguf: Path, tiny_onnx: Path) -> list[BenchResult]:
    return bench_models([str(tiny_gguf), str(tiny_onnx)], SMALL)


def test_every_engine_gets_the_same_tokens(results: list[BenchResult]) -> None:
    assert [result.engine for result in results] == ["llama.cpp", "onnxruntime"]
    assert [result.kind for result in results] == ["gguf", "onnx"]
    assert len({result.prompt_ids_sha256 for result in results}) == 1


def test_every_repetition_is_a_sample(results: list[BenchResult]) -> None:
    for result in results:
        for summary in (result.prefill_tokens_per_s, result.decode_tokens_per_s, result.ttft_s):
            assert summary.n == len(summary.samples) == SMALL.repetitions
            assert min(summary.samples) > 0


def test_the_figures_of_a_result_agree_with_each_other(
    results: list[BenchResult], tiny_gguf: Path
) -> None:
    assert results[0].file_bytes == size_of(tiny_gguf)
    for result in results:
        gaps_ms = result.ms_per_token
        assert 0 < gaps_ms["p50"] <= gaps_ms["p95"] <= gaps_ms["p99"]
        prefill_s = SMALL.prompt_tokens / result.prefill_tokens_per_s.max
        assert result.ttft_s.min >= prefill_s
        assert result.peak_rss_bytes > 10_000_000
        assert result.load_s > 0


def test_energy_is_measured_or_says_why_not(results: list[BenchResult]) -> None:
    for reading in (result.energy_per_token for result in results):
        assert reading.unit == "J/token"
        assert (reading.value is None) == (reading.reason is not None)
        assert reading.value != 0


def test_a_result_survives_json(results: list[BenchResult]) -> None:
    document = json.loads(json.dumps(results[0].as_dict()))
    assert document["schema_version"] == 1
    assert document["machine"]["n_usable_cores"] >= 1
    assert "edgekd" in document["tools"]
    assert result_from_dict(document).as_dict() == results[0].as_dict() | {
        "machine": document["machine"]
    }


def test_the_table_names_every_model_and_its_spread(
    results: list[BenchResult], tiny_gguf: Path
) -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render_table(results))
    text = capture.get()
    assert tiny_gguf.name in text
    assert "±" in text
    assert "onnxruntime" in text


def test_a_broken_model_fails_with_the_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(EngineError, match=r"broken\.gguf is cut short"):
        bench_models([str(broken)], SMALL)


def test_a_context_that_is_too_small_is_refused(tiny_gguf: Path) -> None:
    with pytest.raises(EngineError, match="600 prompt and 8 decoded tokens do not fit.* 512"):
        bench_models([str(tiny_gguf)], BenchSettings(prompt_tokens=600, decode_tokens=8))


def test_all_faulty_settings_are_named_together() -> None:
    with pytest.raises(RecipeError, match="prompt_tokens is 0.*repetitions is -1.*n_threads is 0"):
        BenchSettings(prompt_tokens=0, repetitions=-1, n_threads=0)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_a_crash_is_named_by_its_signal(name: str) -> None:
    program = f"import os, signal; os.kill(os.getpid(), signal.{signal.Signals[name].name})"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"killed by {name}" in describe_end(child)
    assert ("run out of memory" in describe_end(child)) == (name == "SIGKILL")
