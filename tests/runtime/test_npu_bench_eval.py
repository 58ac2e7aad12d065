"""`edgekd eval` and `edgekd bench` on an export for an NPU, in the emulator and refused."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgekd.errors import EngineError
from edgekd.export.export_model import export_model
from edgekd.export.to_npu import NpuOptions
from edgekd.runtime.bench import BenchSettings, run_bench
from edgekd.runtime.model_facts import read_facts
from edgekd.runtime.model_kind import ModelKind
from edgekd.runtime.static_model import NPU_FILE
from tests.conftest import TEXTS
from tests.export.npu_shapes import needs_qnn

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schemas/bench-1.json").read_text())
ON_NPU = {graph: {"QNNExecutionProvider": 1} for graph in ("prefill", "decode")}


@pytest.fixture(scope="module")
def on_npu(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npu") / "tiny"
    options = NpuOptions(soc="sm8750", context_tokens=64, prefill_tokens=16, emulate=False)
    export_model(str(tiny_folder), "onnx", folder, target="qnn", npu=options)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(TEXTS), "utf-8")
    return path


def _eval(
    model: Path, text: Path, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekd", "eval", str(model), "--text", str(text)]
    command += ["--tokens", "40", "--window", "20", "--json", "--quiet", *options]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def _document(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_qnn
def test_eval_in_the_emulator_gives_what_the_cpu_gives_and_says_where_it_ran(
    on_npu: Path, text: Path
) -> None:
    emulated = _document(_eval(on_npu, text, "--ep", "qnn", "--require-npu"))
    assert emulated["settings"]["provider"] == "qnn" and emulated["settings"]["require_npu"]
    npu, cpu = emulated["models"][0], _document(_eval(on_npu, text))["models"][0]
    assert npu["engine"] == "onnxruntime qnn emulator"
    assert npu["provider"] == {
        "name": "qnn",
        "label": "verified-in-emulator",
        "is_emulated": True,
        "nodes": ON_NPU,
    }
    assert cpu["provider"]["name"] == "cpu" and not cpu["provider"]["is_emulated"]
    assert {*cpu["provider"]["nodes"]["decode"]} == {"CPUExecutionProvider"}
    perplexities = [model["text"]["perplexity"]["value"] for model in (npu, cpu)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=2e-3)
    assert perplexities[0] != perplexities[1]  # fp16 there, fp32 here: two runs, not one


@needs_qnn
def test_a_benchmark_in_the_emulator_is_void_and_says_why(on_npu: Path) -> None:
    settings = BenchSettings(
        prompt_tokens=16,
        decode_tokens=4,
        repetitions=1,
        n_threads=1,
        warm_up_s=0.1,
        provider="qnn",
        require_npu=True,
    )
    document = json.loads(json.dumps(run_bench([str(on_npu)], settings).as_dict()))
    assert [*jsonschema.Draft202012Validator(SCHEMA).iter_errors(document)] == []
    result = document["results"][0]
    assert result["provider"]["nodes"] == ON_NPU and result["provider"]["name"] == "qnn"
    assert document["settings"]["provider"] == "qnn" and document["settings"]["require_npu"]
    assert not document["valid"] and not result["valid"]
    assert any("says nothing about the chip" in reason for reason in result["invalid_reasons"])


@needs_qnn
def test_sizes_of_a_graph_of_fixed_shapes_are_those_of_the_one_of_any_shape(
    on_npu: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    fixed, free = (read_facts(ModelKind.ONNX, folder) for folder in (on_npu, tiny_onnx))
    for name in ("n_parameters", "prefill_parameters"):
        assert getattr(fixed, name).value == getattr(free, name).value
    layers, heads, head_dim, sides, fp16_bytes = 3, 2, 16, 2, 2
    assert fixed.kv_bytes_per_token.value == layers * heads * head_dim * sides * fp16_bytes
    (tmp_path / NPU_FILE).write_bytes((on_npu / NPU_FILE).read_bytes())
    packed = read_facts(ModelKind.ONNX, tmp_path)
    assert packed.n_parameters.value is None and "no decode.onnx" in (
        packed.n_parameters.reason or ""
    )


@needs_qnn
def test_a_benchmark_does_not_start_on_what_would_fall_back_to_the_cpu(tiny_onnx: Path) -> None:
    settings = BenchSettings(
        prompt_tokens=4, decode_tokens=2, repetitions=1, provider="qnn", require_npu=True
    )
    with pytest.raises(EngineError, match="--require-npu|took no node"):
        run_bench([str(tiny_onnx)], settings)


def test_the_cpu_is_no_npu_for_eval_either(tiny_onnx: Path, text: Path) -> None:
    done = _eval(tiny_onnx, text, "--require-npu")
    assert done.returncode == 1 and "edgekd: the CPU is no NPU" in done.stderr


@needs_qnn
def test_on_a_phone_of_another_chip_eval_says_how_to_build_for_it(
    on_npu: Path, text: Path, tmp_path: Path
) -> None:
    getprop = tmp_path / "getprop"  # Android's
    getprop.write_text("#!/bin/sh\n[ $1 = ro.soc.model ] && echo SM8650\n")
    getprop.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = _eval(on_npu, text, "--ep", "qnn", PATH=path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "compiled for sm8750 (Hexagon v79), this machine is sm8650" in done.stderr
    assert "edgekd export MODEL --format onnx --target qnn --soc sm8650 --ctx 64" in done.stderr


@pytest.mark.skipif(
    find_spec("onnxruntime_ep_openvino") is not None, reason="the real plugin is installed"
)
def test_a_plugin_that_does_not_load_ends_eval_with_a_line(
    tiny_onnx: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.so").write_bytes(b"no library")
    (tmp_path / "onnxruntime_ep_openvino.py").write_text(
        f"def get_library_path():\n    return {str(tmp_path / 'broken.so')!r}\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = _eval(tiny_onnx, text, "--ep", "openvino", PYTHONPATH=path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "edgekd: OpenVINOExecutionProvider cannot be loaded" in done.stderr
    assert "use --ep cpu" in done.stderr
