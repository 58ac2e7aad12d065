"""Every dequantized tensor has one hash: in both files, by readers that are not ours, and later."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest
from gguf.quants import dequantize
from numpy.typing import NDArray
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

from edgekd.errors import VerificationError
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.export_model import Format, export_model
from edgekd.export.plan import make_plan
from edgekd.export.rounded_model import rounded_model
from edgekd.export.tensor_hashes import hash_and_compare, hash_tensors
from edgekd.export.to_onnx import write_onnx
from edgekd.export.verify import verify_against_checkpoint
from edgekd.files import sha256_of
from edgekd.manifest import manifest_path, read_manifest
from edgekd.runtime.gguf_header import read_gguf_header
from tests.export.tiny_models import save_model
from tests.test_cli import run

Array = NDArray[Any]


def sha256(values: Array) -> str:
    """As the manifest's: float32, little endian, no negative zero."""
    return hashlib.sha256((values.astype("<f4") + np.float32(0)).tobytes()).hexdigest()


def hashes_by_gguf_package(path: Path, checkpoint: Checkpoint, kind: gguf.MODEL_ARCH) -> Any:
    """Read the file with the package that llama.cpp's converter uses, names by its own table."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = gguf.get_tensor_name_map(kind, checkpoint.n_layers)
    found = {}
    for name in checkpoint.shard_of:
        stem, _, end = name.rpartition(".")
        tensor = stored.pop(f"{names.get_name(stem)}.{end}")
        values = dequantize(tensor.data, tensor.tensor_type).reshape(checkpoint.shape(name))
        if kind == gguf.MODEL_ARCH.LLAMA and stem.endswith(("q_proj", "k_proj")):
            # llama.cpp rotates neighbours: rows 2i and 2i + 1 of a head are i and i + d/2
            by_head = values.reshape(-1, checkpoint.head_dim // 2, 2, *values.shape[1:])
            values = by_head.swapaxes(1, 2).reshape(values.shape)
        found[name] = sha256(values)
    assert not stored
    return found


def hashes_by_onnx_runtime(folder: Path, checkpoint: Checkpoint) -> Any:
    """Let the runtime's own operators dequantize: times an identity, and by a lookup of all ids."""
    model = onnx.load(str(folder / "model.onnx"))
    found: dict[str, str] = {}
    for stored, values in _matrices(model, int(checkpoint.config["vocab_size"])):
        end = 0
        for name in _names_in(stored):
            start, end = end, end + checkpoint.shape(name)[0]
            assert found.setdefault(name, sha256(values[start:end])) == sha256(values[start:end])
        assert end == len(values)
    return found


def _names_in(stored: str) -> list[str]:
    """``a.q_proj_k_proj.weight`` holds ``a.q_proj.weight`` and ``a.k_proj.weight``."""
    stem, _, end = stored.rpartition(".")
    place, _, last = stem.rpartition(".")
    if not (parts := re.findall(r"[a-z]+_proj", last.replace("_proj_", "_proj "))):
        return [stored]
    return [f"{place}.{part}.{end}" for part in parts]


def _matrices(model: onnx.ModelProto, n_ids: int) -> Iterator[tuple[str, Array]]:
    """Yield stored name and values [rows, columns] of every matrix, norm and bias."""
    ids = np.arange(n_ids)[None]
    yield "model.embed_tokens.weight", _run(model, "embedding", {"input_ids": ids})[0]
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        attributes = {entry.name: entry for entry in node.attribute}
        attributes["accuracy_level"].i = 1  # float32 throughout
        if len(node.input) > 5:
            node.input[5] = ""  # the bias
        identity = np.eye(attributes["K"].i, dtype=np.float32)
        name = node.input[1].removesuffix(".codes")
        yield name, _run(model, node.output[0], {node.input[0]: identity}).T
    for tensor in list(model.graph.initializer):
        if tensor.name.endswith(("norm.weight", ".bias")):
            model.graph.node.append(helper.make_node("Identity", [tensor.name], ["read"]))
            yield tensor.name, _run(model, "read", {})
            del model.graph.node[-1]


def _run(model: onnx.ModelProto, output: str, feeds: dict[str, Array]) -> Array:
    """Return the value ``output`` of the part of ``model`` that follows from ``feeds``."""
    makers = {name: node for node in model.graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[Any] = []
    needed: dict[str, Any] = {}

    def collect(name: str) -> None:
        if name in weights:
            needed[name] = weights[name]
        elif name not in feeds and name and makers[name] not in nodes:
            for each in makers[name].input:
                collect(each)
            nodes.append(makers[name])

    collect(output)
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for name, array in feeds.items()
    ]
    result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "part", inputs, [result], list(needed.values()))
    part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = onnxruntime.InferenceSession(
        part.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    values: Array = session.run([output], feeds)[0]
    return values


def recorded(artifact: Path) -> Any:
    return read_manifest(manifest_path(artifact))["tensors_sha256"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama tied", gguf.MODEL_ARCH.LLAMA),  # rows of q and k change places
        ("qwen2 untied", gguf.MODEL_ARCH.QWEN2),  # biases, a head of its own
        ("gemma3", gguf.MODEL_ARCH.GEMMA3),  # norms with an offset
    ],
)
def test_readers_that_are_not_ours_find_the_recorded_hash_of_every_tensor_in_both_files(
    name: str, kind: gguf.MODEL_ARCH, tmp_path: Path
) -> None:
    checkpoint = save_model(name, tmp_path / "student")
    export_model(str(checkpoint.folder), "gguf", tmp_path / "student.gguf")
    export_model(str(checkpoint.folder), "onnx", tmp_path / "onnx")
    in_gguf, in_onnx = recorded(tmp_path / "student.gguf"), recorded(tmp_path / "onnx")
    assert in_gguf == in_onnx and set(in_gguf) == set(checkpoint.shard_of)
    assert hashes_by_gguf_package(tmp_path / "student.gguf", checkpoint, kind) == in_gguf
    assert hashes_by_onnx_runtime(tmp_path / "onnx", checkpoint) == in_onnx


@pytest.mark.parametrize("name", ["llama linear rope", "phi3", "qwen3"])
def test_biases_of_rotated_rows_and_fused_matrices_hash_alike(name: str, tmp_path: Path) -> None:
    checkpoint = save_model(name, tmp_path / "student")
    for output_format, out in (("gguf", tmp_path / "a.gguf"), ("onnx", tmp_path / "b")):
        export_model(str(checkpoint.folder), output_format, out)  # type: ignore[arg-type]
    assert recorded(tmp_path / "a.gguf") == recorded(tmp_path / "b")
    assert set(recorded(tmp_path / "b")) == set(checkpoint.shard_of)


def _flip(path: Path, offset_bytes: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset_bytes] ^= 1
    path.write_bytes(content)


def _forge(artifact: Path, changed: Path) -> None:
    """Give the manifest the hash of the changed file, and leave those of the tensors."""
    path = manifest_path(artifact)
    manifest = json.loads(path.read_text("utf-8"))
    manifest["files"][changed.name]["sha256"] = sha256_of(changed)
    path.write_text(json.dumps(manifest), "utf-8")


@pytest.mark.parametrize("output_format", ["gguf", "onnx"])
def test_verify_finds_a_changed_tensor_without_the_checkpoint(
    output_format: Format, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / ("tiny.gguf" if output_format == "gguf" else "tiny")
    export_model(str(tiny_folder), output_format, out)
    good = run("verify", str(out), "--json")
    assert json.loads(good.stdout.splitlines()[-1])["tensors"] == "29 unchanged", good.stderr
    weights = out if output_format == "gguf" else out / "model.onnx.data"
    _flip(weights, weights.stat().st_size - 40)  # in the last tensor
    _forge(out, weights)
    bad = run("verify", str(out))
    assert bad.returncode == 1 and "not the tensors that its manifest recorded" in bad.stderr


def test_a_manifest_without_hashes_of_tensors_is_read_still(
    tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tiny.gguf"
    export_model(str(tiny_folder), "gguf", out)
    manifest = json.loads(manifest_path(out).read_text("utf-8"))
    del manifest["tensors_sha256"]
    manifest_path(out).write_text(json.dumps(manifest), "utf-8")
    report = json.loads(run("verify", str(out), "--json").stdout.splitlines()[-1])
    assert report["tensors"].startswith("unavailable: ")


def test_a_changed_float_in_a_row_that_no_probe_reads_is_found(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    out, plan = tmp_path / "tiny.gguf", make_plan(tiny, "f16")
    export_model(str(tiny.folder), "gguf", out, quant="f16")
    before = hash_tensors(out)
    entries = {tensor.name: tensor for tensor in read_gguf_header(out).tensors}
    table = entries["token_embd.weight"]
    _flip(out, table.offset_bytes + table.size_bytes - 2)  # the last of a row of no token
    changed = {name for name, digest in hash_tensors(out).items() if before[name] != digest}
    assert changed == {"model.embed_tokens.weight"}
    with pytest.raises(VerificationError, match=r"model.embed_tokens.weight are missing or not"):
        verify_against_checkpoint(out, tiny, plan)


@pytest.mark.parametrize("output_format", ["gguf", "onnx"])
def test_weights_beyond_what_a_scale_holds_are_refused(
    output_format: Format, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][-1, 0] = 1e8  # as q8_0: a scale of 787,402
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match="embed_tokens.weight has weights beyond what q8_0"):
        export_model(str(folder), output_format, tmp_path / "out")


def test_a_folder_for_cuda_has_the_same_matrices_and_norms_of_sixteen_bits(
    tiny: Checkpoint, tiny_onnx: Path, tmp_path: Path
) -> None:
    plan = make_plan(tiny, "q4_0")
    write_onnx(tiny, plan, tmp_path, "cuda")
    weights = dict(rounded_model(tiny, plan).named_parameters())
    for_cuda, for_cpu = hash_and_compare(tmp_path, tiny, plan, weights), hash_tensors(tiny_onnx)
    assert set(for_cuda) == set(for_cpu)
    assert all(for_cuda[name] == for_cpu[name] for name in plan.grids())
