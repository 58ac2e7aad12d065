"""Graphs of fixed shapes for NPUs: what they hold, and that they compute what torch does."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.devices.snapdragon import SOCS, detect_soc, find_soc
from edgekd.errors import EngineError, ExportError, ModelError, RecipeError, VerificationError
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.export_model import export_model
from edgekd.export.plan import Quant, make_plan
from edgekd.export.qnn_compile import compile_graphs
from edgekd.export.read_back import read_gguf_blocks, read_graph_blocks
from edgekd.export.rounded_model import rounded_model
from edgekd.export.to_npu import (
    HOST_DATA_FILE,
    PLACEMENT_FILE,
    WEIGHTS_FILE,
    NpuOptions,
    write_npu,
)
from edgekd.export.verify import blocks_equal, check_blocks, verify_as_recorded
from edgekd.manifest import read_manifest
from edgekd.progress import Silence
from edgekd.runtime.loading import open_model
from edgekd.runtime.npu_engine import NpuEngine, attention_mask
from edgekd.runtime.static_model import Compiled, read_static, write_static
from edgekd.runtime.torch_engine import TorchEngine
from tests.conftest import make_gguf
from tests.export.npu_shapes import CONTEXT, PREFILL, PROMPT, needs_qnn, write_uncompiled
from tests.export.tiny_models import save_model


@pytest.fixture(scope="module")
def static(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_uncompiled(tiny, tmp_path_factory.mktemp("static") / "tiny")


@pytest.fixture(scope="module")
def rounded(tiny: Checkpoint) -> TorchEngine:
    return TorchEngine(rounded_model(tiny, make_plan(tiny, "q4_0")), CONTEXT)


@contextmanager
def _engine(folder: Path, *args: Any, **options: Any) -> Iterator[NpuEngine]:
    engine = NpuEngine(folder, CONTEXT, 1, *args, **options)
    yield engine
    engine.close()


def _greedy(engine: Any, n_tokens: int = 16) -> list[int]:
    engine.rewind()
    chosen = [int(engine.forward(PROMPT).argmax())]
    while len(chosen) < n_tokens:
        chosen.append(int(engine.forward([chosen[-1]]).argmax()))
    return chosen


def test_layers_are_of_fixed_shape_and_of_operators_that_npus_know(static: Path) -> None:
    for name in ("prefill", "decode"):
        graph = onnx.load(str(static / f"{name}.onnx"), load_external_data=False).graph
        own = {node.op_type for node in graph.node if node.domain}
        assert own == {"MatMulNBits"}
        values = (*graph.input, *graph.output)
        assert all(dim.dim_value > 0 for v in values for dim in v.type.tensor_type.shape.dim)


def test_graphs_share_their_weights(tiny: Checkpoint, static: Path) -> None:
    bits = {"q4_0": 4.5, "q8_0": 8.5, "f32": 16}  # norms are stored in fp16
    plan = make_plan(tiny, "q4_0")
    sizes = {
        name: np.prod(tiny.shape(name)) * bits[stored] / 8 for name, stored in plan.types.items()
    }
    embedding = sizes.pop("model.embed_tokens.weight")
    tables = 2 * CONTEXT * tiny.head_dim // 2 * 2  # cosines and sines in fp16
    padding = 4096 * 4
    stored = (static / HOST_DATA_FILE).stat().st_size
    assert embedding + tables <= stored < embedding + tables + padding
    n_entries = sum(
        len(onnx.load(str(static / f"{name}.onnx"), load_external_data=False).graph.initializer)
        for name in ("decode",)
    )
    stored = (static / WEIGHTS_FILE).stat().st_size
    assert sum(sizes.values()) <= stored < sum(sizes.values()) + 4096 * n_entries


def test_every_graph_holds_the_blocks_of_the_gguf(
    tiny: Checkpoint, static: Path, tmp_path: Path
) -> None:
    expected = dict(read_gguf_blocks(make_gguf(tiny, "q4_0", tmp_path), tiny))
    for name in ("prefill", "decode"):
        found = dict(read_graph_blocks(static / f"{name}.onnx"))
        assert found.keys() == expected.keys()
        assert all(blocks_equal(found[matrix], expected[matrix]) for matrix in expected)
    ((embedding, blocks),) = read_graph_blocks(static / "host.onnx")
    assert blocks_equal(blocks, expected[embedding])


def test_one_changed_code_is_found(tiny: Checkpoint, static: Path, tmp_path: Path) -> None:
    for file in static.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    plan = make_plan(tiny, "q4_0")
    check_blocks(tmp_path, tiny, plan)
    data = bytearray((tmp_path / HOST_DATA_FILE).read_bytes())
    data[0] ^= 1
    (tmp_path / HOST_DATA_FILE).write_bytes(data)
    with pytest.raises(VerificationError, match=r"embed_tokens.weight is not the checkpoint's"):
        check_blocks(tmp_path, tiny, plan)


def test_prompts_and_single_tokens_give_what_torch_gives(
    static: Path, rounded: TorchEngine
) -> None:
    with _engine(static) as engine:
        assert engine.name == "onnxruntime"
        for ids in (PROMPT, [7], [9, 11, 13], [8]):
            found = engine.forward(ids, every_logit=True)
            np.testing.assert_allclose(found, rounded.forward(ids, every_logit=True), atol=0.1)
        assert engine.position == rounded.position == len(PROMPT) + 5
        assert _greedy(engine) == _greedy(rounded)


def test_forgotten_tokens_are_not_seen_again(static: Path) -> None:
    with _engine(static) as engine:
        engine.forward(PROMPT)
        once = engine.forward([7])
        engine.rewind(3)
        engine.forward([99] * 30)
        engine.rewind(3)
        engine.forward(PROMPT[3:])
        np.testing.assert_allclose(engine.forward([7]), once, atol=0.05)


def test_the_last_slot_of_the_context_is_used_and_none_behind_it(
    static: Path, rounded: TorchEngine
) -> None:
    ids = [int(i) for i in np.random.default_rng(0).integers(3, 400, CONTEXT)]
    rounded.rewind()
    expected = rounded.forward(ids, every_logit=True)
    with _engine(static) as engine:
        engine.forward(ids[:-3])  # the next piece's padding would reach beyond the context
        found = engine.forward(ids[-3:], every_logit=True)
        np.testing.assert_allclose(found, expected[-3:], atol=0.1)
        with pytest.raises(EngineError, match="do not fit into a context of 64"):
            engine.forward([5])


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("llama linear rope", "q8_0"),  # with biases
        ("qwen3", "f16"),
        ("gemma3", "q8_0"),
        ("phi4", "q4_0"),
        ("smollm3", "q8_0"),
    ],
)
def test_every_family_gives_what_torch_gives(name: str, quant: Quant, tmp_path: Path) -> None:
    checkpoint = save_model(name, tmp_path / "model")
    engine = TorchEngine(rounded_model(checkpoint, make_plan(checkpoint, quant)), CONTEXT)
    ids = list(range(5, 55))  # beyond Gemma's window
    expected = engine.forward(ids, every_logit=True)
    with _engine(write_uncompiled(checkpoint, tmp_path / "npu", quant)) as static:
        found = np.concatenate(
            [
                static.forward(ids[:48], every_logit=True),
                *(static.forward([i])[None] for i in ids[48:]),
            ]
        )
    spread = float(expected.std())
    np.testing.assert_allclose(found, expected, atol=0.05 * spread)


@given(st.integers(0, 12), st.integers(1, 6), st.one_of(st.none(), st.integers(1, 9)))
def test_the_mask_shows_a_token_what_lies_before_it(
    n_past: int, n_new: int, window: int | None
) -> None:
    n_slots = 12
    mask = attention_mask(n_past, n_new, n_slots, window)
    for row in range(n_new):
        position = n_past + row
        for column in range(n_slots + n_new):
            is_new = column >= n_slots
            other = n_past + column - n_slots if is_new else column
            exists = is_new or column < n_past
            near = window is None or position - other < window
            assert (mask[row, column] == 0) == (exists and other <= position and near)


def _compiled_for(soc: str) -> Compiled:
    chip = find_soc(soc)
    return Compiled(
        soc=soc,
        soc_model=chip.soc_model,
        htp_arch=chip.htp_arch,
        sdk="v1",
        graphs={"prefill": "p", "decode": "d"},
        binaries={},
    )


def test_a_binary_for_another_chip_is_refused_with_the_command_that_builds_it(
    static: Path, tmp_path: Path
) -> None:
    for file in static.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_static(tmp_path, replace(read_static(static), compiled=_compiled_for("sm8750")))
    tree = tmp_path / "phone" / "sys/devices/soc0"
    tree.mkdir(parents=True)
    (tree / "machine").write_text("SM8650\n")
    assert detect_soc(tmp_path / "phone") == "sm8650"
    with pytest.raises(
        ModelError, match=r"for sm8750 \(Hexagon v79\).* is sm8650; .*--soc sm8650 --ctx 64"
    ):
        NpuEngine(tmp_path, CONTEXT, 1, "qnn", root=tmp_path / "phone")


def test_what_is_not_compiled_says_how_to_compile_it(static: Path) -> None:
    with pytest.raises(ModelError, match="not compiled for an NPU; build it with: edgekd export"):
        NpuEngine(static, CONTEXT, 1, "qnn")


def test_unknown_chips_and_sizes_that_do_not_fit_are_refused(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="'sm9999' is unknown; known are sm8550"):
        NpuOptions(soc="sm9999")
    with pytest.raises(ExportError, match="--prefill 64 and --ctx 32"):
        NpuOptions(context_tokens=32)
    with pytest.raises(ExportError, match="longer than the model's 512"):
        write_npu(
            tiny, make_plan(tiny, "q4_0"), tmp_path, NpuOptions(context_tokens=513), Silence()
        )
    with pytest.raises(ExportError, match="NPU graphs know f16"):
        write_npu(tiny, make_plan(tiny, "f32"), tmp_path, NpuOptions(context_tokens=64), Silence())
    assert len({soc.soc_model for soc in SOCS}) == len(SOCS)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"schema_version": 3}, "another schema version"),
        ({"schema_version": 2, "n_parts": "2"}, "n_parts is '2'"),
        ({"schema_version": 2, "n_parts": 0}, "n_parts is 0"),
        ({"compiled": {"graphs": {"prefill": "p"}}}, "no file for decode"),
    ],
)
def test_a_damaged_description_is_refused(
    changes: dict[str, Any], fault: str, static: Path, tmp_path: Path
) -> None:
    content = json.loads((static / "npu.json").read_text())
    if "compiled" in changes:
        changes = {"compiled": asdict(_compiled_for("sm8750")) | changes["compiled"]}
    (tmp_path / "npu.json").write_text(json.dumps(content | changes))
    with pytest.raises(ModelError, match=f"{fault}.*export the model again"):
        read_static(tmp_path)


@pytest.fixture(scope="module")
def on_npu(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model exported for an NPU, whose export ran it in the emulator."""
    folder = tmp_path_factory.mktemp("npu") / "tiny-sm8750"
    options = NpuOptions(soc="sm8750", context_tokens=CONTEXT, prefill_tokens=PREFILL)
    export_model(str(tiny_folder), "onnx", folder, target="qnn", npu=options)
    return folder


@needs_qnn
def test_an_export_for_an_npu_says_what_was_seen_where(on_npu: Path, tiny_folder: Path) -> None:
    manifest = read_manifest(on_npu / "edgekd.json")
    report = manifest["verification"]
    assert report["npu"]["label"] == report["on_npu"]["label"] == "verified-in-emulator"
    compiled = report["npu"]["compiled"]
    assert (compiled["soc"], compiled["htp_arch"]) == ("sm8750", 79)
    assert compiled["sdk"].startswith("v2.") and set(compiled["binaries"]) <= set(manifest["files"])
    assert report["on_npu"]["to_torch"]["n_positions"] == PREFILL + 2
    assert report["on_npu"]["to_torch"]["kl_nats"] < 1e-3
    assert report["on_npu"]["to_onnx_cpu"]["kl_nats"] < 1e-3
    assert manifest["recipe"]["target"] == "qnn" and manifest["recipe"]["npu"]["soc"] == "sm8750"
    again = verify_as_recorded(on_npu, tiny_folder, manifest["recipe"])
    assert again["on_npu"]["label"] == "verified-in-emulator"


@needs_qnn
@pytest.mark.parametrize("soc", [soc.name for soc in SOCS if soc.name != "sm8750"])
def test_binaries_of_every_chip_in_the_table_run(soc: str, static: Path, tmp_path: Path) -> None:
    for file in static.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    compiled = compile_graphs(tmp_path, find_soc(soc)).compiled
    write_static(tmp_path, replace(read_static(static), compiled=compiled))
    with _engine(tmp_path, "qnn", require_npu=True) as npu, _engine(static) as cpu:
        assert _greedy(npu, 4) == _greedy(cpu, 4)


@needs_qnn
def test_every_node_of_the_layers_is_placed_on_the_npu(on_npu: Path) -> None:
    placed = json.loads((on_npu / PLACEMENT_FILE).read_text())
    for graph in ("prefill", "decode"):
        nodes = placed["graphs"][graph]
        assert Counter(node["provider"] for node in nodes) == {"QNNExecutionProvider": len(nodes)}
        assert len([node for node in nodes if node["op"] == "MatMulNBits"]) == 13


@needs_qnn
def test_the_emulator_decodes_what_the_cpu_decodes(on_npu: Path) -> None:
    with _engine(on_npu, "qnn", require_npu=True) as npu, _engine(on_npu, "cpu") as cpu:
        assert npu.name == "onnxruntime qnn emulator"
        assert npu.provider_use.nodes == {
            g: {"QNNExecutionProvider": 1} for g in ("prefill", "decode")
        }
        assert _greedy(npu) == _greedy(cpu)


@needs_qnn
def test_the_emulator_is_never_chosen_by_itself(on_npu: Path) -> None:
    opened = open_model(on_npu, context_tokens=CONTEXT, provider="auto")
    assert opened.engine.name == "onnxruntime"


@needs_qnn
def test_nodes_that_the_npu_does_not_take_come_with_a_reason(static: Path, tmp_path: Path) -> None:
    for file in static.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = onnx.load(str(tmp_path / "decode.onnx"), load_external_data=False)
    for node in model.graph.node:  # an operator that QNN does not have
        if node.op_type == "Softmax" and "layers.1." in node.output[0]:
            twice = onnx.helper.make_node("Cosh", [node.input[0]], ["odd"], name="odd")
            node.input[0] = "odd"
            model.graph.node.insert(list(model.graph.node).index(node), twice)
            break
    (tmp_path / "decode.onnx").write_bytes(model.SerializeToString())
    result = compile_graphs(tmp_path, find_soc("sm8650"))
    assert result.report()["nodes_on_cpu"] == {"prefill": 0, "decode": 1}
    (left,) = (node for node in result.placement["decode"] if "reason" in node)
    assert left["op"] == "Cosh" and "not supported" in left["reason"]
    write_static(tmp_path, replace(read_static(static), compiled=result.compiled))
    with pytest.raises(EngineError, match=r"--require-npu: 1 of \d+ nodes .*Cosh"):
        NpuEngine(tmp_path, CONTEXT, 1, "qnn", require_npu=True)
