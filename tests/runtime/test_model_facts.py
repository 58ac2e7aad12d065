"""Sizes read from files, against the models themselves."""

import json
from pathlib import Path

import pytest

from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.runtime.llamacpp_engine import LlamaCppEngine, load_library
from edgekd.runtime.model_facts import ModelFacts, read_facts
from edgekd.runtime.model_kind import ModelKind
from edgekd.runtime.roofline import Roofline, decode_share, prefill_share, probe_roofline
from tests.conftest import make_gguf, make_onnx, save_tiny_model


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("untied") / "untied"
    return open_checkpoint(save_tiny_model(folder, tie_word_embeddings=False))


def _values(facts: ModelFacts) -> tuple[float | None, ...]:
    readings = (facts.n_parameters, facts.prefill_parameters, facts.weight_bytes_per_token)
    return tuple(reading.value for reading in readings)


def _body(checkpoint: Checkpoint) -> int:
    """Values of the matrices in the layers of the tiny model: 64 wide, 4 + 2 heads of 16."""
    per_layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    return per_layer * int(checkpoint.config["num_hidden_layers"])


def test_a_gguf_file_counts_as_its_checkpoint_does(tiny: Checkpoint, tmp_path: Path) -> None:
    facts = read_facts(ModelKind.GGUF, make_gguf(tiny, "f32", tmp_path))
    assert _values(facts) == (tiny.n_parameters, _body(tiny), 4 * tiny.n_parameters)
    assert _values(read_facts(ModelKind.CHECKPOINT, tiny.folder)) == _values(facts)


def test_a_table_of_which_rows_are_looked_up_is_not_read(
    untied: Checkpoint, tmp_path: Path
) -> None:
    table = int(untied.config["vocab_size"]) * 64
    for kind, path in (
        (ModelKind.GGUF, make_gguf(untied, "f32", tmp_path)),
        (ModelKind.CHECKPOINT, untied.folder),
    ):
        n_all = untied.n_parameters
        assert _values(read_facts(kind, path)) == (n_all, _body(untied), 4 * (n_all - table))


def test_an_onnx_graph_counts_its_matrices(
    tiny: Checkpoint, untied: Checkpoint, tmp_path: Path
) -> None:
    for checkpoint in (tiny, untied):
        facts = read_facts(ModelKind.ONNX, make_onnx(checkpoint, "f32", tmp_path))
        head = int(checkpoint.config["vocab_size"]) * 64
        assert facts.n_parameters.value == _body(checkpoint) + head
        assert facts.prefill_parameters.value == _body(checkpoint)
        read_bytes = facts.weight_bytes_per_token.value
        assert read_bytes == pytest.approx(4 * (_body(checkpoint) + head), rel=0.1)


def test_the_kv_cache_is_as_large_as_the_engine_says(tiny_gguf: Path) -> None:
    c, engine = load_library(), LlamaCppEngine(tiny_gguf, 512, 1)
    sizes = []
    for _ in range(2):
        engine.forward([5] * 200)
        sizes.append(c.llama_state_seq_get_size(engine._context, 0))
    engine.close()
    per_token = read_facts(ModelKind.GGUF, tiny_gguf).kv_bytes_per_token.value
    # The state also holds a position and a sequence id for each token.
    assert per_token == pytest.approx((sizes[1] - sizes[0]) / 200, abs=16)


def test_an_onnx_cache_is_in_float32(tiny: Checkpoint, tiny_onnx: Path, tiny_gguf: Path) -> None:
    onnx = read_facts(ModelKind.ONNX, tiny_onnx).kv_bytes_per_token.value
    gguf = read_facts(ModelKind.GGUF, tiny_gguf).kv_bytes_per_token.value
    assert gguf and onnx == 2 * gguf
    assert read_facts(ModelKind.CHECKPOINT, tiny.folder).kv_bytes_per_token.value == onnx


def test_a_configuration_that_says_too_little_has_a_reason(
    tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    (tmp_path / "model.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes())
    reading = read_facts(ModelKind.CHECKPOINT, tmp_path).kv_bytes_per_token
    assert reading.value is None and "num_attention_heads" in (reading.reason or "")


def test_the_limits_of_this_machine_are_plausible(tiny_gguf: Path) -> None:
    limits = probe_roofline(1)
    assert limits.read_bytes_per_s.value == max(limits.read_samples)
    assert 1e8 < (limits.read_bytes_per_s.value or 0) < 1e13
    assert 1e8 < (limits.gemm_flop_per_s.value or 0) < 1e14
    facts = read_facts(ModelKind.GGUF, tiny_gguf)
    assert prefill_share(1e3, facts.prefill_parameters, limits) == pytest.approx(
        2e3 * (facts.prefill_parameters.value or 0) / (limits.gemm_flop_per_s.value or 1)
    )


def test_without_limits_there_is_no_share(tiny_gguf: Path) -> None:
    facts = read_facts(ModelKind.GGUF, tiny_gguf)
    nothing: Roofline | None = None
    weights, kv = facts.weight_bytes_per_token, facts.kv_bytes_per_token
    assert decode_share(1e3, weights, kv, 0, nothing) is None
    assert prefill_share(1e3, facts.prefill_parameters, nothing) is None
