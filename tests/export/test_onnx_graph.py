"""What the ONNX file looks like, and that it is read back part by part."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from edgekd.errors import ExportError, VerificationError
from edgekd.export.blocks import dequantize, quantize
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.genai_config import Target
from edgekd.export.onnx_graph import ROWS_KEY
from edgekd.export.plan import Quant, make_plan
from edgekd.export.read_back import read_onnx_blocks
from edgekd.export.to_onnx import MODEL_FILE, write_onnx
from edgekd.export.verify import blocks_equal
from edgekd.runtime.loading import open_model
from tests.conftest import TEXTS, save_tiny_model

# B batch, S new tokens, V vocabulary

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
TARGETS: tuple[Target, ...] = ("cpu", "cuda")
EMBEDDING = "model.embed_tokens.weight"


def _graph(folder: Path) -> onnx.GraphProto:
    return onnx.load(str(folder / MODEL_FILE), load_external_data=False).graph


def _export(checkpoint: Checkpoint, folder: Path, quant: str = "q4_0", **plan: object) -> Path:
    folder.mkdir()
    write_onnx(checkpoint, replace(make_plan(checkpoint, quant), **plan), folder)  # type: ignore[arg-type]
    return folder


def test_a_layer_has_four_matrices_and_no_sum_stands_alone(
    tiny: Checkpoint, tiny_onnx: Path
) -> None:
    found = Counter(node.op_type for node in _graph(tiny_onnx).node)
    assert found["MatMulNBits"] == 4 * tiny.n_layers + 1  # q, k, v are one, gate and up another
    assert found["GroupQueryAttention"] == tiny.n_layers
    assert found["SkipSimplifiedLayerNormalization"] == 2 * tiny.n_layers
    assert found["RMSNormalization"] == 1 and "Add" not in found


@pytest.mark.parametrize("head", ["q8_0", "q4_0"])
def test_a_tied_embedding_is_stored_once_and_looked_up_exactly(
    head: str, tiny: Checkpoint, tmp_path: Path
) -> None:
    types = make_plan(tiny, "q4_0").types | {EMBEDDING: head}
    folder = _export(tiny, tmp_path / "onnx", types=types)
    graph = _graph(folder)
    (lookup,) = (node for node in graph.node if node.op_type == "GatherBlockQuantized")
    (product,) = (node for node in graph.node if "logits" in node.output)
    assert lookup.input[0] == product.input[1]
    assert lookup.input[3]  # zero points are said, not left to the device
    rows = _value(folder, "embedding", np.array([[3, 0, 404]]))
    table = dequantize(quantize(tiny.tensor(EMBEDDING), head))  # type: ignore[arg-type]
    np.testing.assert_array_equal(rows[0], table[[3, 0, 404]].numpy())


def test_matrices_on_different_grids_stay_apart_and_compute_the_same(
    tiny: Checkpoint, tiny_onnx: Path, tmp_path: Path
) -> None:
    plan = make_plan(tiny, "q8_0")
    values = {name: "f32" for name in plan.types if "v_proj" in name}
    mixed = _export(tiny, tmp_path / "mixed", "q8_0", types=plan.types | values)
    whole = _export(tiny, tmp_path / "whole", "q8_0")
    assert Counter(n.op_type for n in _graph(mixed).node)["Concat"] == tiny.n_layers
    assert set(dict(read_onnx_blocks(mixed))) == set(plan.grids()) - set(values)
    ids = list(range(5, 25))
    logits = [
        open_model(folder, context_tokens=64).engine.forward(ids) for folder in (mixed, whole)
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=0.5)
    assert not np.array_equal(logits[0], logits[1])


def test_parts_come_back_in_their_order(tiny: Checkpoint, tiny_onnx: Path) -> None:
    found = dict(read_onnx_blocks(tiny_onnx))
    for side in "qkv":
        name = f"model.layers.1.self_attn.{side}_proj.weight"
        assert blocks_equal(found[name], quantize(tiny.tensor(name), "q4_0"))


def test_f16_is_half_of_f32_and_every_weight_rounded_once(tiny: Checkpoint, tmp_path: Path) -> None:
    folders = {quant: _export(tiny, tmp_path / quant, quant) for quant in ("f32", "f16")}
    data = {
        quant: sum(
            len(tensor.raw_data)
            for tensor in onnx.load(str(folder / MODEL_FILE)).graph.initializer
            if tensor.name.endswith("weight") and len(tensor.dims) == 2
        )
        for quant, folder in folders.items()
    }
    assert data["f16"] * 2 == data["f32"] > 4 * tiny.n_parameters * 0.9
    stored = {t.name: t for t in onnx.load(str(folders["f16"] / MODEL_FILE)).graph.initializer}
    found = onnx.numpy_helper.to_array(stored["model.layers.1.mlp.down_proj.weight"])
    expected = tiny.tensor("model.layers.1.mlp.down_proj.weight").half().numpy()
    np.testing.assert_array_equal(found, expected, strict=True)


@pytest.mark.parametrize(("quant", "tolerance"), [("f32", 0.1), ("f16", 0.1), ("q4_0", 0.5)])
def test_a_graph_for_cuda_calculates_in_fp16_with_the_same_blocks(
    quant: Quant, tolerance: float, tiny: Checkpoint, tmp_path: Path
) -> None:
    ids, logits = list(range(5, 45)), {}
    for target in TARGETS:
        folder = tmp_path / target
        folder.mkdir()
        write_onnx(tiny, make_plan(tiny, quant), folder, target)
        engine = open_model(folder, context_tokens=64).engine
        logits[target] = engine.forward(ids, every_logit=True)
    described = json.loads((tmp_path / "cuda" / "genai_config.json").read_text())
    assert described["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]
    graph = _graph(tmp_path / "cuda")
    types = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert types == {onnx.TensorProto.INT64, onnx.TensorProto.FLOAT16}
    np.testing.assert_allclose(logits["cuda"], logits["cpu"], atol=tolerance)
    blocks = [dict(read_onnx_blocks(tmp_path / target)) for target in TARGETS]
    assert blocks[0].keys() == blocks[1].keys()
    assert all(blocks_equal(blocks[0][name], blocks[1][name]) for name in blocks[0])


def test_weights_too_large_for_fp16_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = -70_000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="weights beyond 65504"):
        _export(open_checkpoint(folder), tmp_path / "onnx", "f16")


def test_rows_that_do_not_add_up_are_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    for file in tiny_onnx.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = onnx.load(str(tmp_path / MODEL_FILE), load_external_data=False)
    (entry,) = (entry for entry in model.metadata_props if entry.key == ROWS_KEY)
    rows = json.loads(entry.value)
    next(iter(rows.values()))["model.layers.0.self_attn.v_proj.weight"] -= 1
    entry.value = json.dumps(rows)
    (tmp_path / MODEL_FILE).write_bytes(model.SerializeToString())
    with pytest.raises(VerificationError, match="is said to hold"):
        dict(read_onnx_blocks(tmp_path))


def test_two_sequences_of_different_length_run_in_one_batch(tiny_onnx: Path) -> None:
    loaded = open_model(tiny_onnx, context_tokens=64)
    long, short = [
        loaded.tokenizer.encode(text)[:n] for text, n in zip(TEXTS, (20, 9), strict=False)
    ]
    expected = []
    for ids in (long, short):
        loaded.engine.rewind()
        loaded.engine.forward(ids)
        expected.append(loaded.engine.forward([7]))
    session = ort.InferenceSession(str(tiny_onnx / MODEL_FILE))
    n_pad = len(long) - len(short)
    ids_BS = np.array([long, short + [0] * n_pad])
    mask_BS = np.array([[1] * len(long), [1] * len(short) + [0] * n_pad])
    _, *cache = _step(session, ids_BS, mask_BS, ())
    grown_B1 = np.pad(mask_BS, ((0, 0), (0, 1)))
    grown_B1[0, len(long)] = grown_B1[1, len(short)] = 1
    logits_B1V, *_ = _step(session, np.array([[7], [7]]), grown_B1, cache)
    np.testing.assert_allclose(logits_B1V[:, 0], np.stack(expected), atol=1e-3)


def test_channels_that_the_operator_cannot_rotate_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "narrow", num_attention_heads=8, num_key_value_heads=2)
    with pytest.raises(ExportError, match="heads rotate 8 channels"):
        _export(open_checkpoint(folder), tmp_path / "onnx", "f32")


def _step(
    session: ort.InferenceSession, ids_BS: Ids, mask_BS: Ids, cache: Sequence[Floats]
) -> list[Floats]:
    """Return logits and a cache that has grown, as callers without shared buffers do it.

    ``logits_to_keep`` is left out.
    """
    pasts = [entry for entry in session.get_inputs() if entry.name.startswith("past")]
    shapes = [(len(ids_BS), entry.shape[1], 0, entry.shape[3]) for entry in pasts]
    before = cache or [np.zeros(shape, np.float32) for shape in shapes]
    inputs: dict[str, Any] = {entry.name: value for entry, value in zip(pasts, before, strict=True)}
    presents = [name.replace("past_key_values", "present") for name in inputs]
    inputs |= {"input_ids": ids_BS, "attention_mask": mask_BS}
    found: list[Floats] = session.run(["logits", *presents], inputs)
    return found


def _value(folder: Path, name: str, ids_BS: Ids) -> Floats:
    """Return the value ``name`` inside the graph for the prompts ``ids_BS``."""
    model = onnx.load(str(folder / MODEL_FILE))
    logits = next(output for output in model.graph.output if output.name == "logits")
    logits.CopyFrom(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = ort.InferenceSession(model.SerializeToString())
    pasts = [entry for entry in session.get_inputs() if entry.name.startswith("past")]
    shapes = {entry.name: (len(ids_BS), entry.shape[1], 0, entry.shape[3]) for entry in pasts}
    inputs: dict[str, Any] = {past: np.zeros(shape, np.float32) for past, shape in shapes.items()}
    inputs |= {"input_ids": ids_BS, "attention_mask": np.ones_like(ids_BS)}
    found: Floats = session.run([name], inputs)[0]
    return found
