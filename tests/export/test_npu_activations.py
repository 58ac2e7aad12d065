"""Graphs for NPUs with 16-bit integer activations: their ranges, their codes, where they run."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.errors import DataError
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.export_model import export_model
from edgekd.export.npu_quantize import (
    Range,
    activations,
    codes_of,
    quantize_graph,
    rounding_for,
    signed_rounding_for,
)
from edgekd.export.plan import make_plan
from edgekd.export.rounded_model import rounded_model
from edgekd.export.to_npu import NpuOptions, write_graphs, write_npu
from edgekd.export.verify import check_blocks
from edgekd.export.verify_npu import NpuLimit, npu_faults
from edgekd.manifest import read_manifest
from edgekd.progress import Silence
from edgekd.runtime.fidelity import Fidelity
from edgekd.runtime.npu_engine import NpuEngine
from edgekd.runtime.static_model import read_static
from edgekd.runtime.torch_engine import TorchEngine
from tests.conftest import TEXTS
from tests.export.npu_shapes import CONTEXT, PREFILL, PROMPT, needs_qnn

ENDS = st.floats(-1e4, 1e4, width=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(TEXTS * 8), "utf-8")
    return path


@pytest.fixture(scope="module")
def a16(tiny_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model exported with 16-bit activations; where QNN is, the emulator ran it."""
    folder = tmp_path_factory.mktemp("a16") / "tiny-sm8750"
    options = NpuOptions(
        soc="sm8750", context_tokens=CONTEXT, prefill_tokens=PREFILL, activations_text=text
    )
    export_model(str(tiny_folder), "onnx", folder, target="qnn", npu=options)
    return folder


def _greedy(engine: NpuEngine, n_tokens: int = 8) -> list[int]:
    engine.rewind()
    chosen = [int(engine.forward(PROMPT).argmax())]
    while len(chosen) < n_tokens:
        chosen.append(int(engine.forward([chosen[-1]]).argmax()))
    return chosen


@given(ENDS, ENDS)
def test_codes_come_back_within_half_a_step(one: float, other: float) -> None:
    seen = Range(min(one, other), max(one, other), 1.0)
    values = np.linspace(seen.low, seen.high, 64, dtype=np.float32)
    for rounding in (rounding_for(seen), signed_rounding_for(seen)):
        offset = int(rounding.zero_point)
        read = (codes_of(values, rounding).astype(np.float32) - offset) * rounding.scale
        assert np.abs(read - values).max() <= rounding.scale * 0.51 + 1e-30
        assert codes_of(np.zeros(1, np.float32), rounding)[0] == offset  # 0 is exact


def test_matrices_keep_their_blocks(tiny: Checkpoint, a16: Path) -> None:
    assert check_blocks(a16, tiny, make_plan(tiny, "q4_0")) > 0


def test_values_are_integers_and_the_cache_is_stored_as_signed_ones(a16: Path) -> None:
    graph = onnx.load(str(a16 / "decode.onnx"), load_external_data=False).graph
    cache = [v for v in (*graph.input, *graph.output) if "key_values" in v.name]
    assert {v.type.tensor_type.elem_type for v in cache} == {TensorProto.INT16}
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    read_by_matrices = [n.input[0] for n in graph.node if n.op_type == "MatMulNBits"]
    assert {made_by[name] for name in read_by_matrices} == {"DequantizeLinear"}


def test_prompts_and_single_tokens_are_near_torch(tiny: Checkpoint, a16: Path) -> None:
    rounded = TorchEngine(rounded_model(tiny, make_plan(tiny, "q4_0")), CONTEXT)
    engine = NpuEngine(a16, CONTEXT, 1, "cpu")
    for ids in (PROMPT, [7], [9, 11, 13], [8]):
        expected = rounded.forward(ids, every_logit=True)
        np.testing.assert_allclose(engine.forward(ids, every_logit=True), expected, atol=0.15)
    engine.close()


def test_values_with_a_few_huge_elements_stay_floats(tiny: Checkpoint, tmp_path: Path) -> None:
    options = NpuOptions(context_tokens=CONTEXT, prefill_tokens=PREFILL)
    write_graphs(tiny, make_plan(tiny, "q4_0"), tmp_path, options)
    path = tmp_path / "decode.onnx"
    names = activations(onnx.load(str(path), load_external_data=False))
    ranges = dict.fromkeys(names, Range(-1.0, 1.0, 0.1))
    ranges["model.norm.sum"] = Range(-874.0, 22_828.0, 3.1)  # seen in SmolLM2-135M
    assert quantize_graph(path, ranges, -30.0) == 1
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    (norm,) = [node for node in nodes if node.name == "model.norm.output"]
    assert norm.input[0] == "model.norm.sum" and norm.output[0] == "model.norm.output.exact"


def test_the_manifest_says_what_was_calibrated_on_what(a16: Path) -> None:
    manifest = read_manifest(a16 / "edgekd.json")
    npu = manifest["verification"]["npu"]
    assert npu["activations"]["type"] == read_static(a16).activations == "a16"
    assert npu["activations"]["n_tokens"] >= PREFILL
    assert len(manifest["recipe"]["npu"]["activations_text_sha256"]) == 64


def test_a_text_shorter_than_a_piece_is_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a b", "utf-8")
    options = NpuOptions(context_tokens=CONTEXT, prefill_tokens=PREFILL, activations_text=short)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="tokens long; give at least the 16 of --prefill"):
        write_npu(tiny, make_plan(tiny, "q4_0"), tmp_path / "out", options, Silence())


def test_the_option_goes_with_qnn_alone(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    command = ["export", str(tiny_folder), "--format", "onnx", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--calibrate-activations", str(text)])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()


def test_every_figure_out_of_its_limit_is_named() -> None:
    limit = NpuLimit(0.01, 0.5)
    near, far = Fidelity(0.001, 1.0, 18), Fidelity(0.02, 1.0, 18)
    assert npu_faults(near, near, 0.0, limit) == []
    assert "to the CPU" in npu_faults(near, far, 0.0, limit)[0]
    assert "to torch" in npu_faults(far, near, 0.0, limit)[0]
    assert "below torch's" in npu_faults(near, near, 0.6, limit)[0]
    assert len(npu_faults(Fidelity(float("nan"), 1.0, 18), near, 0.0, limit)) == 1


@needs_qnn
def test_the_emulator_runs_every_node_and_gives_what_the_cpu_gives(a16: Path) -> None:
    report = read_manifest(a16 / "edgekd.json")["verification"]
    assert report["npu"]["label"] == "verified-in-emulator"
    assert report["npu"]["nodes_on_cpu"] == {"prefill": 0, "decode": 0}
    # With unsigned keys, which QNN rounds to 8 bits, it is 8e-3.
    assert report["on_npu"]["to_onnx_cpu"]["kl_nats"] < 5e-4
    npu = NpuEngine(a16, CONTEXT, 1, "qnn", require_npu=True)
    cpu = NpuEngine(a16, CONTEXT, 1, "cpu")
    assert _greedy(npu) == _greedy(cpu)
    npu.close()
    cpu.close()
