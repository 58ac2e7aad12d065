"""Tiny random models of every family, both exports against torch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgekd.errors import ExportError
from edgekd.export.architectures import ARCHITECTURES, architecture_of
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.from_gguf import gguf_to_checkpoint
from edgekd.export.plan import make_plan
from edgekd.export.read_back import read_gguf_blocks, read_onnx_blocks
from edgekd.export.to_gguf import write_gguf
from edgekd.export.to_onnx import write_onnx
from edgekd.export.verify import blocks_equal, rounded_model
from edgekd.runtime.fidelity import compare_engines, compare_greedy
from edgekd.runtime.loading import open_model
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import TorchEngine, load_causal_lm
from tests.conftest import TEXTS, make_tokenizer, save_tokenizer

COMMON: dict[str, Any] = {
    "vocab_size": 405,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
GEMMA3 = {
    "num_hidden_layers": 7,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 24,
}
PHI4 = {"num_attention_heads": 2, "num_key_value_heads": 1, "partial_rotary_factor": 0.5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama linear rope": ("Llama", {"rope_parameters": LINEAR_ROPE, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "smollm3": ("SmolLM3", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma3": ("Gemma3", {**GEMMA3, "tie_word_embeddings": True}),
    "gemma3 softcap": ("Gemma3", {**GEMMA3, "final_logit_softcapping": 5.0}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi4": ("Phi3", {**PHI4, "tie_word_embeddings": True}),
}


def save_model(name: str, folder: Path) -> Checkpoint:
    family, changes = MODELS[name]
    config_class = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_class)(**(COMMON | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            torch.nn.init.normal_(parameter, 0.3, 0.2)  # or what is wrong with them stays hidden
    model.save_pretrained(folder)
    save_tokenizer(folder, make_tokenizer())
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("architectures")
    # Not named after their family: llama.cpp looks for the tokens of a "phi-3" by its name.
    return {name: save_model(name, folder / f"model-{i}") for i, name in enumerate(MODELS)}


@pytest.fixture(scope="module")
def sequences(checkpoints: dict[str, Checkpoint]) -> list[list[int]]:
    tokenizer = FileTokenizer(checkpoints["qwen2"].folder)
    return [tokenizer.encode(text) for text in (" ".join(TEXTS), TEXTS[1])]


@pytest.mark.parametrize("name", MODELS)
def test_both_exports_compute_what_torch_computes(
    name: str, checkpoints: dict[str, Checkpoint], sequences: list[list[int]], tmp_path: Path
) -> None:
    checkpoint = checkpoints[name]
    plan = make_plan(checkpoint, "f32")
    write_gguf(checkpoint, plan, tmp_path / "model.gguf")
    (tmp_path / "onnx").mkdir()
    write_onnx(checkpoint, plan, tmp_path / "onnx")
    exact = TorchEngine(load_causal_lm(checkpoint.folder, torch.float32), 256)
    for artifact in ("model.gguf", "onnx"):
        engine = open_model(tmp_path / artifact, context_tokens=256).engine
        found = compare_engines(exact, engine, sequences)
        greedy = compare_greedy(exact, engine, [ids[:8] for ids in sequences], 24)
        engine.close()
        assert found.kl_nats <= 1e-5, (artifact, found)
        # Random weights have near ties; anything but a near tie is a fault.
        assert found.top1_agreement >= 0.99 and greedy.worst_gap_nats < 1e-3, (artifact, greedy)


@pytest.mark.parametrize("name", MODELS)
def test_a_token_at_a_time_gives_what_a_prompt_gives(
    name: str, checkpoints: dict[str, Checkpoint], sequences: list[list[int]], tmp_path: Path
) -> None:
    (tmp_path / "onnx").mkdir()
    write_onnx(checkpoints[name], make_plan(checkpoints[name], "f32"), tmp_path / "onnx")
    engine = open_model(tmp_path / "onnx", context_tokens=256).engine
    ids = sequences[0][:60]
    together = torch.from_numpy(engine.forward(ids, every_logit=True))
    engine.rewind()
    engine.forward(ids[:5])
    singly = torch.stack([torch.from_numpy(engine.forward([token])) for token in ids[5:]])
    torch.testing.assert_close(singly, together[5:], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_both_files_hold_the_same_blocks(
    name: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    checkpoint = checkpoints[name]
    plan = make_plan(checkpoint, "q4_0")
    write_gguf(checkpoint, plan, tmp_path / "model.gguf")
    (tmp_path / "onnx").mkdir()
    write_onnx(checkpoint, plan, tmp_path / "onnx")
    in_gguf = dict(read_gguf_blocks(tmp_path / "model.gguf", checkpoint))
    in_onnx = dict(read_onnx_blocks(tmp_path / "onnx"))
    assert set(in_gguf) == set(in_onnx) == set(plan.grids())
    assert all(blocks_equal(in_gguf[key], in_onnx[key]) for key in in_onnx)


@pytest.mark.parametrize("name", MODELS)
def test_onnx_blocks_compute_what_torch_computes_with_them(
    name: str, checkpoints: dict[str, Checkpoint], sequences: list[list[int]], tmp_path: Path
) -> None:
    plan = make_plan(checkpoints[name], "q8_0")
    write_onnx(checkpoints[name], plan, tmp_path)
    rounded = TorchEngine(rounded_model(checkpoints[name], plan), 256)
    engine = open_model(tmp_path, context_tokens=256).engine
    found = compare_engines(rounded, engine, sequences)
    engine.close()
    assert found.kl_nats < 0.005, found  # activations in int8


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama3 rope"])
def test_a_gguf_can_be_read_back(
    name: str, checkpoints: dict[str, Checkpoint], sequences: list[list[int]], tmp_path: Path
) -> None:
    checkpoint = checkpoints[name]
    write_gguf(checkpoint, make_plan(checkpoint, "f32"), tmp_path / "model.gguf")
    gguf_to_checkpoint(tmp_path / "model.gguf", tmp_path / "back")
    engines = [
        TorchEngine(load_causal_lm(folder, torch.float32), 256)
        for folder in (checkpoint.folder, tmp_path / "back")
    ]
    found = compare_engines(engines[0], engines[1], sequences)
    assert found.kl_nats < 1e-9, found


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("llama tied", {"architectures": ["OtherForCausalLM"]}, "supported are LlamaForCausalLM"),
        ("llama tied", {"hidden_act": "relu"}, "activation 'relu'"),
        ("mistral", {"sliding_window": 64}, "sliding window of 64"),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True}, "sliding window of 64"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "one in four"),
        ("gemma3", {"query_pre_attn_scalar": 32}, "is not head_dim 16"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "one in six"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attention softcapping"),
        ("phi3", {"sliding_window": 64}, "sliding window of 64"),
    ],
)
def test_what_would_be_translated_wrongly_is_refused(
    name: str, changes: dict[str, Any], complaint: str, checkpoints: dict[str, Checkpoint]
) -> None:
    config = json.loads((checkpoints[name].folder / "config.json").read_text())
    with pytest.raises(ExportError, match=complaint):
        architecture_of(config | changes)


def test_every_family_s_names_can_be_turned_back() -> None:
    for architecture in ARCHITECTURES:
        for hf in architecture.layer_names:
            name = f"model.layers.3.{hf}.weight"
            assert architecture.to_hf_name(architecture.to_gguf_name(name)) == name
