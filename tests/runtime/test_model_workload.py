import json
import struct
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekd.errors import ModelError
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.plan import Quant
from edgekd.runtime.model_workload import read_workload
from edgekd.runtime.onnx_header import read_onnx_header
from tests.conftest import make_gguf, make_onnx

ANY_FILE = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_a_checkpoint_counts_as_its_gguf(tiny: Checkpoint, tiny_gguf: Path) -> None:
    own, exported = read_workload(str(tiny.folder)), read_workload(str(tiny_gguf))
    assert own.n_weights == exported.n_weights == tiny.n_parameters
    assert (own.format, exported.format) == ("F32", "Q4_0")
    assert own.kv_bytes_per_token == exported.kv_bytes_per_token
    assert own.vocab_size == exported.vocab_size


@pytest.mark.parametrize("quant", ["f32", "f16", "q8_0", "q4_0", "q4_1"])
def test_asking_about_a_quantization_gives_the_bytes_of_that_export(
    quant: Quant, tiny: Checkpoint, tmp_path: Path
) -> None:
    asked = read_workload(str(tiny.folder), quant)
    written = read_workload(str(make_gguf(tiny, quant, tmp_path)))
    assert (asked.stored_bytes, asked.read_bytes) == (written.stored_bytes, written.read_bytes)


@pytest.mark.parametrize("quant", ["f32", "q8_0", "q4_0"])
def test_an_onnx_graph_reads_what_the_gguf_reads(
    quant: Quant, tiny: Checkpoint, tmp_path: Path
) -> None:
    graph = read_workload(str(make_onnx(tiny, quant, tmp_path)))
    gguf = read_workload(str(make_gguf(tiny, quant, tmp_path)))
    assert graph.format == gguf.format
    assert graph.read_bytes == pytest.approx(gguf.read_bytes, rel=0.02)
    assert (graph.n_body, graph.n_head) == (gguf.n_body, gguf.n_head)
    # ONNX Runtime's processor kernels keep the cache in float32, llama.cpp in float16.
    assert graph.kv_bytes_per_token == 2 * gguf.kv_bytes_per_token


def test_the_onnx_header_equals_what_the_onnx_package_reads(tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx / "model.onnx", load_external_data=False)
    theirs = {t.name: tuple(t.dims) for t in model.graph.initializer}
    header = read_onnx_header(tiny_onnx / "model.onnx")
    assert {t.name: t.shape for t in header.tensors} == theirs
    assert header.cache_value_bytes == 4


@given(data=st.data())
@ANY_FILE
def test_a_cut_onnx_file_is_one_clear_error_or_a_smaller_graph(
    data: st.DataObject, tiny_onnx: Path, tmp_path: Path
) -> None:
    content = (tiny_onnx / "model.onnx").read_bytes()
    file = tmp_path / "model.onnx"
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        header = read_onnx_header(file)
    except ModelError as error:
        assert str(file) in str(error)
    else:
        assert len(header.tensors) <= len(read_onnx_header(tiny_onnx / "model.onnx").tensors)


@given(st.binary(max_size=300))
@ANY_FILE
def test_any_bytes_are_survived_as_onnx_and_as_safetensors(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    try:
        read_onnx_header(file)
    except ModelError as error:
        assert str(file) in str(error)
    folder = tmp_path / "checkpoint"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"num_attention_heads": 1, "hidden_size": 8}')
    (folder / "x.safetensors").write_bytes(content)
    with pytest.raises(ModelError):
        read_workload(str(folder))


def test_experts_are_read_by_their_share(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.experts.0.down_proj.weight": [16, 8],
        "model.layers.0.mlp.experts.1.down_proj.weight": [16, 8],
        "model.layers.0.self_attn.o_proj.weight": [8, 8],
        "model.embed_tokens.weight": [32, 8],
        "lm_head.weight": [32, 8],
        "model.norm.weight": [8],
    }
    entries = {
        name: {"dtype": "F16", "shape": shape, "data_offsets": [0, 0]}
        for name, shape in tensors.items()
    }
    header = json.dumps(entries).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    config = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 8}
    config |= {"num_hidden_layers": 3, "vocab_size": 32}
    config |= {"num_experts_per_tok": 1, "num_local_experts": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    workload = read_workload(str(tmp_path))
    # One of two experts, attention, head and norm; the embedding is one row.
    assert workload.read_bytes == 2 * (128 + 64 + 256 + 8)
    assert workload.stored_bytes == 2 * (256 + 64 + 512 + 8)
    assert workload.kv_bytes_per_token == 2 * 3 * 1 * 4 * 2
    assert workload.in_quant("f16").read_bytes == pytest.approx(workload.read_bytes, rel=0.05)


def test_a_stored_copy_of_a_tied_head_is_not_counted(tiny: Checkpoint, tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [10, 8], "data_offsets": [0, 0]}
    header = json.dumps({"model.embed_tokens.weight": entry, "lm_head.weight": entry}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    config = {"num_attention_heads": 1, "hidden_size": 8, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert read_workload(str(tmp_path)).n_weights == 80


def test_nothing_heavy_is_imported_to_read_a_model(tiny_gguf: Path) -> None:
    program = (
        "import sys; from edgekd.runtime.model_workload import read_workload;"
        f"read_workload({str(tiny_gguf)!r}); import edgekd.devices.fit, edgekd.devices.probe;"
        "sys.exit(bool({'numpy', 'torch', 'onnx', 'onnxruntime', 'llama_cpp'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
