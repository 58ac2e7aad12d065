"""Tiny random models of every family, both exports against torch."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from llama_cpp import llama_cpp

from edgekd.errors import ExportError
from edgekd.export import onnx_matrices
from edgekd.export.architectures import ARCHITECTURES, architecture_of
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.from_gguf import gguf_to_checkpoint
from edgekd.export.plan import Quant, make_plan
from edgekd.export.read_back import read_gguf_blocks, read_onnx_blocks
from edgekd.export.rounded_model import rounded_model
from edgekd.export.to_gguf import write_gguf
from edgekd.export.to_onnx import write_onnx
from edgekd.export.verify import blocks_equal
from edgekd.runtime.fidelity import Fidelity, compare_engines, compare_greedy
from edgekd.runtime.loading import open_model
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import TorchEngine, load_causal_lm
from tests.conftest import TEXTS
from tests.export.tiny_models import LONG_MODELS, MODELS, save_model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("architectures")
    # Not named after their family: llama.cpp looks for the tokens of a "phi-3" by its name.
    return {name: save_model(name, folder / f"model-{i}") for i, name in enumerate(MODELS)}


@pytest.fixture(scope="module")
def sequences(checkpoints: dict[str, Checkpoint]) -> list[list[int]]:
    """1,000 positions and more: a text, and ids at random, which meet every row."""
    tokenizer = FileTokenizer(checkpoints["qwen2"].folder)
    seeded = torch.Generator().manual_seed(1)
    random_ids = torch.randint(0, 400, (4, 250), generator=seeded).tolist()
    return [tokenizer.encode(" ".join(TEXTS)), *random_ids]


@contextmanager
def float32_attention() -> Iterator[None]:
    """Let llama.cpp attend in float32; as shipped it rounds keys and values to 16 bits."""
    defaults = llama_cpp.llama_context_default_params

    def exact_params() -> Any:
        params = defaults()
        params.type_k = params.type_v = GGMLQuantizationType.F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return params

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "llama_context_default_params", exact_params)
        yield


def measure(
    checkpoint: Checkpoint, artifact: Path, sequences: list[list[int]], context_tokens: int = 256
) -> Fidelity:
    """Return how far ``artifact`` is from torch."""
    exact = TorchEngine(load_causal_lm(checkpoint.folder, torch.float32), context_tokens)
    engine = open_model(artifact, context_tokens=context_tokens).engine
    found = compare_engines(exact, engine, sequences)
    engine.close()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_both_exports_compute_what_torch_computes(
    name: str, checkpoints: dict[str, Checkpoint], sequences: list[list[int]], tmp_path: Path
) -> None:
    checkpoint = checkpoints[name]
    plan = make_plan(checkpoint, "f32")
    write_gguf(checkpoint, plan, tmp_path / "model.gguf")
    (tmp_path / "onnx").mkdir()
    write_onnx(checkpoint, plan, tmp_path / "onnx")
    with float32_attention():
        in_gguf = measure(checkpoint, tmp_path / "model.gguf", sequences)
    in_onnx = measure(checkpoint, tmp_path / "onnx", sequences)
    # torch's own float32 is as far from its float64; ggml keeps GELU in a table of 16-bit floats.
    has_gelu = checkpoint.architecture.activation == "gelu_tanh"
    for found, limit in ((in_gguf, 1e-6 if has_gelu else 1e-9), (in_onnx, 1e-9)):
        assert found.n_positions > 1000
        assert found.kl_nats <= limit and found.top1_agreement >= 0.999, found


@pytest.mark.parametrize("name", MODELS)
def test_engines_as_shipped_stay_close(
    name: str, checkpoints: dict[str, Checkpoint], sequences: list[list[int]], tmp_path: Path
) -> None:
    checkpoint = checkpoints[name]
    write_gguf(checkpoint, make_plan(checkpoint, "f32"), tmp_path / "model.gguf")
    assert measure(checkpoint, tmp_path / "model.gguf", sequences).kl_nats <= 1e-5
    exact = TorchEngine(load_causal_lm(checkpoint.folder, torch.float32), 256)
    engine = open_model(tmp_path / "model.gguf", context_tokens=256).engine
    greedy = compare_greedy(exact, engine, [ids[:8] for ids in sequences], 24)
    engine.close()
    assert greedy.worst_gap_nats < 0.02, greedy  # anything but a near tie is a fault


@pytest.mark.parametrize("name", LONG_MODELS)
def test_two_sets_of_rotary_frequencies_are_chosen_by_length(
    name: str, sequences: list[list[int]], tmp_path: Path
) -> None:
    checkpoint = save_model(name, tmp_path / "model")
    plan = make_plan(checkpoint, "f32")
    write_gguf(checkpoint, plan, tmp_path / "model.gguf")
    doubled = [sequences[1] + sequences[2], sequences[3] + sequences[4]]
    with float32_attention():
        short = measure(checkpoint, tmp_path / "model.gguf", sequences, 256)
        long = measure(checkpoint, tmp_path / "model.gguf", doubled, 512)
    for found in (short, long):
        assert found.kl_nats <= 1e-9 and found.top1_agreement >= 0.999, found
    (tmp_path / "onnx").mkdir()
    with pytest.raises(ExportError, match="only GGUF can hold"):
        write_onnx(checkpoint, plan, tmp_path / "onnx")


def test_a_list_of_rotary_factors_of_another_length_is_refused(tmp_path: Path) -> None:
    checkpoint = save_model("phi3 longrope", tmp_path / "model")
    checkpoint.config["rope_parameters"]["long_factor"] = [1.0] * 7
    with pytest.raises(ExportError, match="8 short and 7 long factors for 8"):
        write_gguf(checkpoint, make_plan(checkpoint, "f32"), tmp_path / "model.gguf")


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


@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", MODELS)
def test_onnx_blocks_compute_what_torch_computes_with_them(
    name: str,
    quant: Quant,
    checkpoints: dict[str, Checkpoint],
    sequences: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_matrices, "_ACCURACY_LEVEL", 1)  # activations stay float32
    plan = make_plan(checkpoints[name], quant)
    write_onnx(checkpoints[name], plan, tmp_path)
    rounded = TorchEngine(rounded_model(checkpoints[name], plan), 256)
    engine = open_model(tmp_path, context_tokens=256).engine
    found = compare_engines(rounded, engine, sequences)
    engine.close()
    assert found.kl_nats < 1e-9 and found.top1_agreement >= 0.999, found


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
