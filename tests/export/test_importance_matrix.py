"""The importance matrix against its definition, and what comes of it against llama.cpp."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGUFReader

from edgekd.errors import ExportError, ModelError
from edgekd.export.calibrate import calibrate
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.export_options import CalibrationOptions
from edgekd.export.importance_matrix import (
    ImportanceMatrix,
    measure_importance,
    read_importance,
    write_importance,
)
from edgekd.export.k_quants import quantize_rows
from edgekd.export.plan import make_plan, parse_quant
from edgekd.export.to_gguf import write_gguf
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import load_causal_lm
from tests.conftest import TEXTS, save_tiny_model

_Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
_DOWN_PROJ = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Llama whose rows hold K-quants, and whose q and k change rows on the way to GGUF."""
    folder = tmp_path_factory.mktemp("imatrix") / "wide"
    return open_checkpoint(save_tiny_model(folder, hidden_size=256, intermediate_size=512))


@pytest.fixture(scope="module")
def ids(wide: Checkpoint) -> list[int]:
    return FileTokenizer(wide.folder).encode(" ".join(TEXTS * 12))[:700]


@pytest.fixture(scope="module")
def importance(wide: Checkpoint, ids: list[int]) -> ImportanceMatrix:
    return measure_importance(wide, ids, "texts")


def test_sums_are_those_of_the_inputs(
    wide: Checkpoint, ids: list[int], importance: ImportanceMatrix
) -> None:
    model = load_causal_lm(wide.folder, torch.float32).eval()
    seen = []
    down = model.get_submodule(_DOWN_PROJ.removesuffix(".weight"))
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for start in (0, 512):
            model(torch.tensor([ids[start : start + 512]]))
    expected_K = torch.cat(seen).double().square().mean(0)
    found_K = importance.mean_squares(_DOWN_PROJ)
    assert importance.counts[_DOWN_PROJ] == len(ids) == 700
    np.testing.assert_allclose(found_K, expected_K.numpy(), rtol=1e-5)  # type: ignore[arg-type]


def test_a_file_gives_back_the_sums_and_looks_like_llama_cpps(
    wide: Checkpoint, importance: ImportanceMatrix, tmp_path: Path
) -> None:
    path = tmp_path / "imatrix.gguf"
    write_importance(importance, wide.architecture, path)
    found = read_importance(path, wide)
    assert found.counts == importance.counts
    assert set(found.sums) == set(importance.sums)
    for name, sums_K in importance.sums.items():
        np.testing.assert_array_equal(found.sums[name], sums_K)
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["texts"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (2, 512)
    assert "general.architecture" not in fields
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.2.ffn_down.weight.in_sum2"] == [512, 1]
    assert shapes["blk.2.ffn_down.weight.counts"] == [1, 1]
    assert len(shapes) == 2 * 7 * 3


@pytest.mark.parametrize("quant", ["q4_k_m", "q5_k_m", "q6_k"])
def test_bytes_are_those_of_llama_cpp_with_the_same_matrix(
    quant: str, wide: Checkpoint, importance: ImportanceMatrix, tmp_path: Path
) -> None:
    matrix, ours, source, theirs = (tmp_path / name for name in ("i", "ours", "f32", "theirs"))
    write_importance(importance, wide.architecture, matrix)
    plan = make_plan(wide, parse_quant(quant))
    plan = calibrate(wide, plan, CalibrationOptions(imatrix=matrix), tmp_path)
    write_gguf(wide, plan, ours)
    write_gguf(wide, make_plan(wide, "f32"), source)
    _llama_quantize(source, theirs, quant, wide, importance)
    one, other = ({t.name: t for t in GGUFReader(path).tensors} for path in (ours, theirs))
    assert [name for name in one if not np.array_equal(one[name].data, other[name].data)] == []


def test_importance_changes_the_bytes(wide: Checkpoint, importance: ImportanceMatrix) -> None:
    weight, mean_K = wide.tensor(_Q_PROJ), importance.mean_squares(_Q_PROJ)
    plain, weighted = quantize_rows(weight, "q4_k"), quantize_rows(weight, "q4_k", mean_K)
    assert (plain != weighted).mean() > 0.01


def test_columns_that_no_token_reached_are_not_rounded_to_zero() -> None:
    sums_K = np.ones(256, np.float32)
    sums_K[32:64] = 0
    mean_K = ImportanceMatrix({"x": sums_K}, {"x": 4.0}).mean_squares("x")
    assert mean_K is not None and mean_K.min() > 0 and mean_K[0] == 0.25
    torch.manual_seed(0)
    from edgekd.export.k_quants import dequantize_rows

    values = dequantize_rows(quantize_rows(torch.randn(4, 256), "q6_k", mean_K), "q6_k")
    assert values[:, 32:64].abs().amax(1).min() > 0.5


def test_what_is_no_matrix_of_this_model_is_refused(
    wide: Checkpoint,
    tiny: Checkpoint,
    tiny_gguf: Path,
    importance: ImportanceMatrix,
    tmp_path: Path,
) -> None:
    old = tmp_path / "old.dat"
    old.write_bytes(b"\x10\x00\x00\x00blk.0.attn")
    with pytest.raises(ModelError, match="no GGUF file"):
        read_importance(old, tiny)
    with pytest.raises(ExportError, match="no importance matrix"):
        read_importance(tiny_gguf, tiny)
    path = tmp_path / "wide.gguf"
    write_importance(importance, wide.architecture, path)
    with pytest.raises(ExportError, match="measured on another model"):
        read_importance(path, tiny)


def _llama_quantize(
    source: Path, target: Path, quant: str, checkpoint: Checkpoint, importance: ImportanceMatrix
) -> None:
    means = {name: importance.mean_squares(name) for name in importance.sums}
    entries = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()
    for entry, (name, mean_K) in zip(entries, means.items(), strict=False):
        assert mean_K is not None
        entry.name = checkpoint.architecture.to_gguf_name(name).encode()
        entry.data = mean_K.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = mean_K.size
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {
        "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
        "q5_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
        "q6_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    }[quant]
    params.nthread = 1
    params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert status == 0
