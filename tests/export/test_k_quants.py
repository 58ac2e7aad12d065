"""Our K-quant files against llama.cpp's own quantizer."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFReader

from edgekd.errors import ExportError
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.export_model import export_model
from edgekd.export.k_quants import mixture_types
from edgekd.export.plan import make_plan, parse_quant
from edgekd.export.to_gguf import write_gguf
from tests.conftest import save_tiny_model

_FTYPES = {
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q5_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "q6_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
}


@pytest.fixture(scope="module", params=["tied", "untied", "odd rows"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    wide = {"hidden_size": 256, "intermediate_size": 512, "n_layers": 9}
    options = {
        "tied": wide,
        "untied": {**wide, "tie_word_embeddings": False},
        "odd rows": {"hidden_size": 96, "intermediate_size": 256, "n_layers": 9},
    }[request.param]
    folder = tmp_path_factory.mktemp("k-quants") / "model"
    return open_checkpoint(save_tiny_model(folder, **options))


@pytest.mark.parametrize("quant", list(_FTYPES))
def test_types_and_bytes_are_those_of_llama_cpp(
    quant: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    ours, source, theirs = (tmp_path / name for name in ("ours.gguf", "f32.gguf", "theirs.gguf"))
    write_gguf(checkpoint, make_plan(checkpoint, parse_quant(quant)), ours)
    write_gguf(checkpoint, make_plan(checkpoint, "f32"), source)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _FTYPES[quant]
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(theirs).encode(), ctypes.byref(params)
    )
    assert status == 0
    one, other = ({t.name: t for t in GGUFReader(path).tensors} for path in (ours, theirs))
    types = {name: (t.tensor_type.name, other[name].tensor_type.name) for name, t in one.items()}
    assert {name: pair for name, pair in types.items() if pair[0] != pair[1]} == {}
    assert all(np.array_equal(one[name].data, other[name].data) for name in one)


def test_q4_1_bytes_are_those_of_llama_cpp(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ours, source, theirs = (tmp_path / name for name in ("ours.gguf", "f32.gguf", "theirs.gguf"))
    write_gguf(checkpoint, make_plan(checkpoint, "q4_1"), ours)
    write_gguf(checkpoint, make_plan(checkpoint, "f32"), source)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(theirs).encode(), ctypes.byref(params)
    )
    assert status == 0
    one, other = ({t.name: t for t in GGUFReader(path).tensors} for path in (ours, theirs))
    compared = [name for name in one if one[name].tensor_type.name == "Q4_1"]
    assert len(compared) == 7 * checkpoint.n_layers
    assert all(np.array_equal(one[name].data, other[name].data) for name in compared)


def test_an_export_in_k_quants_is_verified(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.05}
    folder = save_tiny_model(tmp_path / "model", **wide)  # type: ignore[arg-type]
    report = export_model(str(folder), "gguf", tmp_path / "model.gguf", quant="q4_k_m")
    assert report["arithmetic"]["kl_nats"] < 0.02 < report["rounding"]["kl_nats"] * 100
    with pytest.raises(ExportError, match="ONNX export knows"):
        export_model(str(folder), "onnx", tmp_path / "onnx", quant="q4_k_m")


def test_rows_that_no_k_quant_holds_are_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny_model(tmp_path / "model", hidden_size=96))
    types, fallen = mixture_types(checkpoint, "q4_k_m")
    assert "model.layers.0.self_attn.q_proj.weight" in fallen
    assert types["model.embed_tokens.weight"] == "q8_0"
    report = export_model(str(checkpoint.folder), "gguf", tmp_path / "x.gguf", quant="q6_k")
    assert "model.layers.0.self_attn.q_proj.weight" in report["fallen_tensors"]
