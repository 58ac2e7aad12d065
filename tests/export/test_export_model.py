import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgekd.errors import ExportError, ModelError, VerificationError
from edgekd.export.blocks import dequantize, quantize
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.export_model import Format, export_model
from edgekd.export.plan import HeadQuant, make_plan
from edgekd.export.read_back import read_gguf_blocks, read_onnx_blocks
from edgekd.export.verify import blocks_equal, check_blocks
from edgekd.manifest import check_files, manifest_path, read_manifest
from edgekd.runtime.gguf_header import read_gguf_header
from edgekd.runtime.model_kind import detect_kind
from edgekd.runtime.tokenizer import FileTokenizer


@pytest.mark.parametrize(
    ("output_format", "quant"),
    [
        *[("gguf", quant) for quant in ("f16", "bf16", "q8_0", "q4_0", "q4_1")],
        *[("onnx", quant) for quant in ("f32", "f16", "q8_0", "q4_0")],
    ],
)
def test_an_export_passes_its_own_checks_and_leaves_a_manifest(
    output_format: Format, quant: str, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / ("model.gguf" if output_format == "gguf" else "model")
    report = export_model(str(tiny_folder), output_format, out, quant=quant)
    manifest = read_manifest(manifest_path(out))
    check_files(out if out.is_dir() else out.parent, manifest)
    assert manifest["verification"]["arithmetic"] == report["arithmetic"]
    assert manifest["recipe"]["quant"] == quant


def test_gguf_and_onnx_hold_the_same_codes_and_scales(
    tiny: Checkpoint, tiny_gguf: Path, tiny_onnx: Path
) -> None:
    in_gguf = dict(read_gguf_blocks(tiny_gguf, tiny))
    in_onnx = dict(read_onnx_blocks(tiny_onnx))
    assert set(in_gguf) == set(in_onnx) == set(make_plan(tiny, "q4_0").grids())
    assert all(blocks_equal(in_gguf[name], in_onnx[name]) for name in in_gguf)


def test_one_changed_code_is_found(tiny: Checkpoint, tiny_gguf: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    content = bytearray(tiny_gguf.read_bytes())
    matrix = next(t for t in read_gguf_header(tiny_gguf).tensors if t.type_name == "Q4_0")
    content[matrix.offset_bytes + 7] ^= 1
    broken.write_bytes(content)
    with pytest.raises(VerificationError, match="is not the checkpoint's"):
        check_blocks(broken, tiny, make_plan(tiny, "q4_0"))


def test_a_gguf_read_back_has_the_weights_of_its_blocks(
    tiny: Checkpoint, tiny_gguf: Path, tmp_path: Path
) -> None:
    from edgekd.export.from_gguf import gguf_to_checkpoint

    gguf_to_checkpoint(tiny_gguf, tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = dequantize(quantize(tiny.tensor(name), "q4_0"))
    assert back.tensor(name).equal(expected)


def test_another_architecture_is_refused_before_anything_is_written(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))
    with pytest.raises(ExportError, match="architecture Other cannot be exported"):
        export_model(str(folder), "gguf", tmp_path / "out" / "x.gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output_format", ["gguf", "onnx"])
def test_a_head_of_four_bits_is_smaller_and_verified(
    output_format: Format, tiny_folder: Path, tmp_path: Path
) -> None:
    heads: tuple[HeadQuant, ...] = ("q8_0", "q4_0")
    sizes = {}
    for head in heads:
        out = tmp_path / (f"{head}.gguf" if output_format == "gguf" else head)
        report = export_model(str(tiny_folder), output_format, out, head=head)
        sizes[head] = report["bytes"]
        assert read_manifest(manifest_path(out))["recipe"]["head"] == head
    assert sizes["q4_0"] < sizes["q8_0"] - 10_000


def test_q4_1_reaches_onnx_where_every_minimum_is_a_zero_point(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """As in checkpoints that were on an asymmetric integer grid before."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if weight.dim() == 2 and "embed" not in name:
            blocks = weight.reshape(-1, 32)
            codes = torch.randint(0, 16, blocks.shape, generator=generator).float()
            codes[:, 0], codes[:, 1] = 0, 15
            points = torch.randint(3, 13, (len(blocks), 1), generator=generator)
            weights[name] = ((codes - points) / 64).reshape(weight.shape)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    report = export_model(str(folder), "onnx", tmp_path / "onnx", quant="q4_1")
    assert report["rounding"]["kl_nats"] < 0.01  # all but the embedding are exact
    checkpoint = open_checkpoint(folder)
    for name, blocks_found in read_onnx_blocks(tmp_path / "onnx"):
        if "embed" not in name:
            assert dequantize(blocks_found).equal(checkpoint.tensor(name))


def test_q4_1_of_other_weights_and_bf16_are_refused_for_onnx(
    tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="no exact ONNX form"):
        export_model(str(tiny_folder), "onnx", tmp_path / "onnx", quant="q4_1")
    with pytest.raises(ExportError, match="bf16 has no kernels"):
        export_model(str(tiny_folder), "onnx", tmp_path / "onnx", quant="bf16")
    assert not (tmp_path / "onnx").exists()


def test_bf16_stores_the_weights_in_two_bytes(tiny: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    export_model(str(tiny.folder), "gguf", path, quant="bf16")
    entry = next(t for t in read_gguf_header(path).tensors if t.name == "blk.0.ffn_up.weight")
    raw = np.fromfile(path, np.int16, entry.size_bytes // 2, offset=entry.offset_bytes)
    stored = torch.from_numpy(raw).view(torch.bfloat16).reshape(entry.shape[::-1])
    assert stored.equal(tiny.tensor("model.layers.0.mlp.up_proj.weight").bfloat16())


@pytest.mark.parametrize("output_format", ["gguf", "onnx"])
def test_what_fails_its_checks_is_kept_apart_with_the_reason(
    tiny_folder: Path, output_format: Format, tmp_path: Path
) -> None:
    folder, out = tmp_path / "wild", tmp_path / "artifact"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "proj" in name:
            tensor *= 30  # int8 activations then decide every choice
    tensors["model.norm.weight"] *= 1000
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for _ in range(2):  # a second one replaces the first
        with pytest.raises(VerificationError, match="strays.*kept as"):
            export_model(str(folder), output_format, out, quant="q4_0")
    assert not out.exists() and not manifest_path(out).exists()
    assert "strays" in (tmp_path / "artifact.rejected.txt").read_text("utf-8")
    with pytest.raises(ModelError, match="failed its checks.*strays"):
        detect_kind(tmp_path / "artifact.rejected")


def test_a_modelfile_names_the_file_its_stops_and_its_sampling(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "model", tmp_path / "small.q4_0.gguf"
    shutil.copytree(tiny_folder, folder)
    settings = {"temperature": 0.7, "repetition_penalty": 1.1, "eos_token_id": [2]}
    (folder / "generation_config.json").write_text(json.dumps(settings), "utf-8")
    export_model(str(folder), "gguf", out, with_modelfile=True)
    lines = (tmp_path / "small.q4_0.Modelfile").read_text("utf-8").splitlines()
    stop = FileTokenizer(folder).raw_token_bytes(2).decode()
    assert lines[0] == "FROM ./small.q4_0.gguf"
    assert {"PARAMETER temperature 0.7", "PARAMETER repeat_penalty 1.1"} < set(lines)
    assert f'PARAMETER stop "{stop}"' in lines
    with pytest.raises(ExportError, match="Ollama runs GGUF"):
        export_model(str(folder), "onnx", tmp_path / "onnx", with_modelfile=True)
