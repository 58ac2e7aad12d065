import csv
import io
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgekd.errors import RecipeError
from edgekd.runtime.bench import BenchSettings, run_bench
from edgekd.runtime.bench_compare import compare
from edgekd.runtime.bench_formats import FORMS, render
from edgekd.runtime.llama_bench_rows import llama_bench_rows

ROOT = Path(__file__).parents[2]
# What llama.cpp's llama-bench wrote for -o jsonl on a CPU: each field, and the type of its value.
LLAMA_BENCH_FIELDS: dict[str, type] = {
    **dict.fromkeys(("build_commit", "cpu_info", "gpu_info", "backends", "test_time"), str),
    **dict.fromkeys(("model_filename", "model_type", "cpu_mask", "type_k", "type_v"), str),
    **dict.fromkeys(("split_mode", "devices", "tensor_split", "tensor_buft_overrides"), str),
    **dict.fromkeys(("load_mode", "lazy_mode"), str),
    **dict.fromkeys(("build_number", "model_size", "model_n_params", "n_batch", "n_ubatch"), int),
    **dict.fromkeys(("n_threads", "poll", "n_gpu_layers", "n_cpu_moe", "main_gpu"), int),
    **dict.fromkeys(("flash_attn", "no_op_offload", "fit_target", "fit_min_ctx"), int),
    **dict.fromkeys(("n_prompt", "n_gen", "n_depth", "avg_ns", "stddev_ns"), int),
    **dict.fromkeys(("cpu_strict", "no_kv_offload", "embeddings", "no_host", "repack"), bool),
    **dict.fromkeys(("avg_ts", "stddev_ts"), float),
    **dict.fromkeys(("samples_ns", "samples_ts"), list),
}


@pytest.fixture(scope="module")
def document(tiny_gguf: Path, tiny_onnx: Path) -> dict[str, Any]:
    settings = BenchSettings(
        prompt_tokens=16, decode_tokens=8, repetitions=3, n_threads=1, warm_up_s=0.5
    )
    run = run_bench([str(tiny_gguf), str(tiny_onnx)], settings)
    return dict(json.loads(json.dumps(run.as_dict())))


def test_the_table_and_markdown_name_every_model_and_test(document: dict[str, Any]) -> None:
    for form in ("table", "md"):
        text = render(document, form)
        for result in document["results"]:
            assert Path(result["model"]).name in text.replace("\n", "")
        assert "pp16" in text and "tg8" in text and "\u00b1" in text
        assert "energy unavailable: " in text


def test_each_engine_stands_with_how_far_it_was_seen_to_work(document: dict[str, Any]) -> None:
    emulated = json.loads(json.dumps(document))
    emulated["results"][1]["engine"] = "onnxruntime qnn emulator"
    for form in ("table", "md", "html"):
        assert "llama.cpp: verified-on-device" in render(emulated, form)
        assert "onnxruntime qnn emulator: verified-in-emulator" in render(emulated, form)


def test_warnings_come_with_advice(document: dict[str, Any]) -> None:
    spoilt = json.loads(json.dumps(document))
    warning = {"code": "throttled", "message": "it throttled", "advice": "cool it", "invalid": True}
    spoilt["conditions"]["warnings"] = [warning]
    for form in ("table", "md"):
        assert "INVALID: it throttled; cool it" in render(spoilt, form)


def test_csv_has_a_line_for_each_test(document: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(render(document, "csv"))))
    assert [(row["engine"], row["test"]) for row in rows] == [
        (engine, test) for engine in ("llama.cpp", "onnxruntime") for test in ("pp16", "tg8")
    ]
    mean = document["results"][0]["scenarios"][0]["tokens_per_s"]["mean"]
    assert float(rows[0]["tokens_per_s"]) == mean
    assert rows[0]["gap_ms_p95"] == "" and float(rows[1]["gap_ms_p95"]) > 0


def test_json_is_the_document(document: dict[str, Any]) -> None:
    assert json.loads(render(document, "json")) == document


def test_lines_have_the_fields_of_llama_bench(document: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in render(document, "jsonl").splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert {name: type(value) for name, value in row.items()} == LLAMA_BENCH_FIELDS
        n_tokens = row["n_prompt"] + row["n_gen"]
        rates = [n_tokens * 1e9 / ns for ns in row["samples_ns"]]
        assert row["samples_ts"] == pytest.approx(rates)
        assert row["avg_ts"] == pytest.approx(sum(rates) / 3)


def test_our_lines_compare_as_our_document_does(document: dict[str, Any], tmp_path: Path) -> None:
    one, other = tmp_path / "run.jsonl", tmp_path / "run.json"
    one.write_text(render(document, "jsonl"))
    other.write_text(render(document, "json"))
    for compared in compare(str(one), str(other), 0.05).compared:
        assert compared.speed_ratio
        assert compared.speed_ratio.value == pytest.approx(1.0, rel=1e-5)


def test_llama_cpps_own_script_reads_our_lines(document: dict[str, Any], tmp_path: Path) -> None:
    missing = [name for name in ("git", "tabulate") if find_spec(name) is None]
    if missing:
        pytest.skip(f"the script imports {missing}")
    fetch = [sys.executable, str(ROOT / "scripts" / "fetch_converter.py")]
    fetched = subprocess.run(fetch, capture_output=True, text=True)
    if fetched.returncode == 3:
        pytest.skip(fetched.stderr.strip())
    script = Path(fetched.stdout.strip()) / "scripts" / "compare-llama-bench.py"
    rows = [row | {"build_commit": "aaaaaaaa"} for row in llama_bench_rows(document)[:2]]
    rows += [row | {"build_commit": "bbbbbbbb", "avg_ts": 2 * row["avg_ts"]} for row in rows]
    file = tmp_path / "ours.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, str(script), "-i", str(file), "-t", "llama-bench"]
    command += ["-b", "aaaaaaaa", "-c", "bbbbbbbb"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "pp16" in line or "tg8" in line]
    assert len(lines) == 2 and all("2.00" in line for line in lines)


def test_an_unknown_form_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="no form 'xml'; there are table"):
        render(document, "xml")
    assert set(FORMS) == {"table", "json", "jsonl", "csv", "md", "html"}
