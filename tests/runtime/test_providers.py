"""Execution providers: what is not there, does not load or takes nothing is said, never hidden."""

import json
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from edgekd.devices.backends import BACKENDS
from edgekd.errors import EngineError, RecipeError
from edgekd.runtime.loading import open_model
from edgekd.runtime.providers import (
    PROVIDERS,
    Provider,
    choose,
    create_session,
    engine_name,
    label_of_engine,
    placement,
    register,
)
from tests.export.npu_shapes import needs_qnn


def test_what_reports_call_an_engine_has_its_backends_label() -> None:
    engines = {name: engine_name(name) for name in PROVIDERS}
    engines |= {"llamacpp": "llama.cpp", "torch": "torch"}
    assert {name: label_of_engine(engine) for name, engine in engines.items()} == {
        name: BACKENDS[name].label for name in engines
    }
    assert label_of_engine("onnxruntime someday") == "untested"


def _save(path: Path, *op_types: str) -> Path:
    """Write a model of operators in a row, on one matrix."""
    names = [f"value{i}" for i in range(len(op_types) + 1)]
    nodes = [
        helper.make_node(op, [names[i]], [names[i + 1]], name=f"{op}{i}")
        for i, op in enumerate(op_types)
    ]
    shape = [1, 8, 8]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in (names[0], names[-1])
    ]
    graph = helper.make_graph(nodes, "row", ends[:1], ends[1:])
    opset = [helper.make_opsetid("", 23)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=11), path)
    return path


def test_the_cpu_says_that_it_ran_everything(tmp_path: Path) -> None:
    session = create_session(_save(tmp_path / "m.onnx", "Relu", "Celu"), "cpu", n_threads=1)
    assert placement(session) == {"CPUExecutionProvider": 2}


def test_the_cpu_is_no_npu(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="the CPU is no NPU"):
        create_session(_save(tmp_path / "m.onnx", "Relu"), "cpu", n_threads=1, require_npu=True)


def test_unknown_providers_are_refused_and_known_ones_named() -> None:
    with pytest.raises(RecipeError, match="'npu' is unknown; known are auto, .*cpu.*qnn"):
        choose("npu")
    assert choose("CPUExecutionProvider") == "cpu"
    assert choose("auto") in ("cpu", "cuda", "coreml")


def test_a_provider_that_is_not_installed_names_its_package() -> None:
    absent = Provider("AbsentExecutionProvider", "no_such_plugin", "no-such-plugin")
    with pytest.raises(RecipeError, match="not installed; run: pip install no-such-plugin"):
        register(absent)


def test_a_provider_whose_library_does_not_load_is_reported_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.so").write_bytes(b"no library")
    (tmp_path / "broken_plugin.py").write_text(
        f"def get_library_path():\n    return {str(tmp_path / 'broken.so')!r}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    broken = Provider("BrokenExecutionProvider", "broken_plugin", "broken-plugin")
    with pytest.raises(EngineError, match="BrokenExecutionProvider cannot be loaded: .*broken.so"):
        register(broken)
    sys.modules.pop("broken_plugin")


def test_every_provider_is_in_the_table_of_backends() -> None:
    assert PROVIDERS.keys() <= BACKENDS.keys()
    assert BACKENDS["qnn"].label == "verified-in-emulator"  # no chip was at hand


@pytest.mark.parametrize("name", ["openvino", "webgpu"])
def test_only_what_was_close_to_the_cpu_when_it_was_tried_is_called_verified(name: str) -> None:
    path = Path(__file__).parents[2] / "benchmarks/results/providers.json"
    tried = json.loads(path.read_text())["providers"][name]
    ran = [row for row in tried.get("models", {}).values() if "to_cpu" in row]
    far_nats = [found["kl_nats"] for row in ran for found in row["to_cpu"].values()]
    is_good = bool(ran) and max(far_nats) < 0.01
    assert is_good == BACKENDS[name].label.startswith("verified")
    for row in ran:
        assert all(nodes[PROVIDERS[name].full_name] > 0 for nodes in row["nodes"].values())


@needs_qnn
def test_nodes_left_to_the_cpu_are_counted_and_can_be_forbidden(tmp_path: Path) -> None:
    path = _save(tmp_path / "m.onnx", "Relu", "Celu")
    session = create_session(path, "qnn", n_threads=1)
    assert placement(session) == {"QNNExecutionProvider": 1, "CPUExecutionProvider": 1}
    with pytest.raises(EngineError, match=r"--require-npu: 1 of 2 nodes of m.onnx .*\(Celu\)"):
        create_session(path, "qnn", n_threads=1, require_npu=True)


@needs_qnn
def test_a_provider_that_takes_nothing_is_not_believed(tmp_path: Path) -> None:
    path = _save(tmp_path / "m.onnx", "Celu")
    with pytest.raises(EngineError, match="--ep qnn took no node of m.onnx"):
        create_session(path, "qnn", n_threads=1)


@needs_qnn
def test_a_chip_that_the_backend_does_not_know_is_not_run_on_the_cpu_instead(
    tmp_path: Path,
) -> None:
    path = _save(tmp_path / "m.onnx", "Relu")
    with pytest.raises(EngineError, match="took no node"):
        create_session(path, "qnn", n_threads=1, options={"soc_model": "9999"})


@needs_qnn
def test_a_graph_of_any_shape_is_refused_on_an_npu(tiny_onnx: Path) -> None:
    with pytest.raises(EngineError, match="--require-npu|took no node"):
        open_model(tiny_onnx, context_tokens=32, provider="qnn", require_npu=True)
