"""Exports that are rounded on calibration data: equal in both containers, recorded, checked."""

import json
from pathlib import Path

import numpy as np
import pytest

from edgekd.errors import DataError, ExportError, VerificationError
from edgekd.export.blocks import quantize
from edgekd.export.calibrate import calibrate
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.export_model import export_model
from edgekd.export.export_options import CalibrationOptions
from edgekd.export.importance_matrix import measure_importance, write_importance
from edgekd.export.kept_rows import hash_rows
from edgekd.export.plan import make_plan, parse_quant
from edgekd.export.read_back import read_gguf_blocks, read_onnx_blocks
from edgekd.export.to_gguf import write_gguf
from edgekd.export.verify import blocks_equal, check_blocks, verify_as_recorded
from edgekd.manifest import manifest_path, read_manifest
from edgekd.runtime.gguf_header import read_gguf_header
from edgekd.runtime.tokenizer import FileTokenizer
from tests.conftest import TEXTS, save_tiny_model

_OUTER = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("calibrate") / "model"
    return open_checkpoint(save_tiny_model(folder, initializer_range=0.05))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(TEXTS * 20), "utf-8")
    return path


@pytest.fixture(scope="module")
def exports(
    checkpoint: Checkpoint, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The checkpoint by GPTQ, in both containers."""
    folder = tmp_path_factory.mktemp("exports")
    paths = {"gguf": folder / "model.gguf", "onnx": folder / "model-onnx"}
    options = CalibrationOptions(text=text, n_tokens=900)
    model = str(checkpoint.folder)
    export_model(model, "gguf", paths["gguf"], calibration=options)
    export_model(model, "onnx", paths["onnx"], calibration=options)
    return paths


def test_both_containers_hold_the_same_calibrated_blocks(
    checkpoint: Checkpoint, exports: dict[str, Path]
) -> None:
    in_gguf = dict(read_gguf_blocks(exports["gguf"], checkpoint))
    in_onnx = dict(read_onnx_blocks(exports["onnx"]))
    assert all(blocks_equal(in_gguf[name], in_onnx[name]) for name in in_gguf)
    for name, blocks in in_gguf.items():
        plain = quantize(checkpoint.tensor(name), blocks.grid)
        assert blocks_equal(blocks, plain) == (name == _OUTER)


def test_the_manifest_records_data_and_blocks(exports: dict[str, Path]) -> None:
    one, other = (
        read_manifest(manifest_path(path))["recipe"]["calibration"] for path in exports.values()
    )
    assert one == other
    assert one["method"] == "gptq" and one["n_tokens"] == 512  # whole chunks only
    assert len(one["rows_sha256"]) == 3 * 7


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_an_artifact_is_verified_without_its_calibration_text(
    container: str, checkpoint: Checkpoint, exports: dict[str, Path]
) -> None:
    path = exports[container]
    recipe = read_manifest(manifest_path(path))["recipe"]
    assert verify_as_recorded(path, checkpoint.folder, recipe)["equal_matrices"] == 3 * 7 + 1
    changed = json.loads(json.dumps(recipe))
    changed["calibration"]["rows_sha256"]["model.layers.1.mlp.up_proj.weight"] = "0" * 64
    with pytest.raises(VerificationError, match=r"model\.layers\.1\.mlp\.up_proj.*recorded"):
        verify_as_recorded(path, checkpoint.folder, changed)


def test_an_importance_matrix_gives_one_q4_0_for_both_containers(
    checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    ids = FileTokenizer(checkpoint.folder).encode(text.read_text("utf-8"))
    matrix = tmp_path / "imatrix.gguf"
    write_importance(measure_importance(checkpoint, ids, "t"), checkpoint.architecture, matrix)
    options = CalibrationOptions(imatrix=matrix)
    model = str(checkpoint.folder)
    export_model(model, "gguf", tmp_path / "m.gguf", calibration=options)
    export_model(model, "onnx", tmp_path / "onnx", calibration=options)
    in_gguf = dict(read_gguf_blocks(tmp_path / "m.gguf", checkpoint))
    in_onnx = dict(read_onnx_blocks(tmp_path / "onnx"))
    assert all(blocks_equal(in_gguf[name], in_onnx[name]) for name in in_gguf)
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert not blocks_equal(in_gguf[q_proj], quantize(checkpoint.tensor(q_proj), "q4_0"))


def test_text_and_the_matrix_measured_on_it_give_the_same_rows(
    checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    plan, saved = make_plan(checkpoint, parse_quant("q6_k")), tmp_path / "imatrix.gguf"
    first = CalibrationOptions(text=text, n_tokens=512, save_imatrix=saved)
    by_text = calibrate(checkpoint, plan, first, tmp_path).kept
    by_file = calibrate(checkpoint, plan, CalibrationOptions(imatrix=saved), tmp_path).kept
    assert by_text is not None and by_file is not None
    assert by_text.sha256 == by_file.sha256


def test_one_changed_byte_of_a_weighted_k_quant_is_found(
    checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    """Rows of 64 fall to Q5_0, which is ggml's as well."""
    plan, path = make_plan(checkpoint, parse_quant("q4_k_m")), tmp_path / "model.gguf"
    plan = calibrate(checkpoint, plan, CalibrationOptions(text=text, n_tokens=512), tmp_path)
    write_gguf(checkpoint, plan, path)
    assert check_blocks(path, checkpoint, plan) == 3 * 7 + 1
    content = bytearray(path.read_bytes())
    matrix = next(t for t in read_gguf_header(path).tensors if t.type_name == "Q5_0")
    content[matrix.offset_bytes + 9] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerificationError, match="is not the checkpoint's as q5_0"):
        check_blocks(path, checkpoint, plan)


@pytest.mark.parametrize(
    ("quant", "options", "complaint"),
    [
        ("f16", {"text": "T"}, "f16 is rounded without data"),
        ("q4_0", {"text": "T", "imatrix": "T"}, "not both"),
        ("q4_0", {"text": "T", "save_imatrix": "T"}, "is measured for"),
        ("q6_k", {"save_imatrix": "T"}, "on calibration text"),
        ("q4_0", {"text": "T", "n_tokens": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    quant: str, options: dict[str, object], complaint: str, checkpoint: Checkpoint, text: Path
) -> None:
    given = {key: text if value == "T" else value for key, value in options.items()}
    plan = make_plan(checkpoint, parse_quant(quant))
    with pytest.raises(ExportError, match=complaint):
        calibrate(checkpoint, plan, CalibrationOptions(**given), text.parent)  # type: ignore[arg-type]


def test_text_that_is_missing_or_empty_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan, empty = make_plan(checkpoint, "q4_0"), tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(DataError, match="no text"):
        calibrate(checkpoint, plan, CalibrationOptions(text=empty), tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        calibrate(checkpoint, plan, CalibrationOptions(text=tmp_path / "no.txt"), tmp_path)


def test_hashes_are_of_content_not_of_memory_order() -> None:
    rows = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert hash_rows(rows) == hash_rows(np.asfortranarray(rows)) != hash_rows(rows.T)
