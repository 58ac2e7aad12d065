"""Bad checkpoints are refused in one line that says what is wrong, and nothing is left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, pre_tokenizers

from edgekd.errors import EdgekdError
from edgekd.export.architectures import ARCHITECTURES, ties_embedding
from edgekd.export.checkpoint import open_checkpoint
from edgekd.export.export_model import Format, export_model
from edgekd.export.input_faults import expected_shapes
from edgekd.export.verify import PROBE_TEXTS
from edgekd.runtime.tokenizer import FileTokenizer
from tests.conftest import make_tokenizer, save_tiny_model, save_tokenizer
from tests.export.tiny_models import MODELS, save_model

Weights = dict[str, torch.Tensor]
BOTH_FORMATS = pytest.mark.parametrize("output_format", ["gguf", "onnx"])
# What a tiny model of the tables has not: biases of every kind.
BIASED = [
    ("llama tied", {"attention_bias": True, "mlp_bias": True}),
    ("smollm3", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
    ("gemma3", {"attention_bias": True}),
]


def changed_copy(folder: Path, to: Path, change: Callable[[Weights], Any]) -> Path:
    """Return a copy of the checkpoint in ``folder`` with the weights that ``change`` leaves."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


def refusal(folder: Path, output_format: Format, tmp_path: Path) -> str:
    """Return why ``folder`` is not exported; one line, and no file."""
    out = tmp_path / "out" / ("model.gguf" if output_format == "gguf" else "onnx")
    with pytest.raises(EdgekdError) as caught:
        export_model(str(folder), output_format, out)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in MODELS), *BIASED])
def test_names_and_shapes_are_those_that_transformers_saves(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = save_model(name, tmp_path, **changes)
    stored = {tensor: checkpoint.shape(tensor) for tensor in checkpoint.shard_of}
    assert expected_shapes(checkpoint) == stored


def test_a_head_that_config_json_leaves_open_is_tied_as_transformers_ties_it() -> None:
    for name in (name for entry in ARCHITECTURES for name in entry.hf_names):
        stem = name.removesuffix("ForCausalLM")
        config_class = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(stem, stem) + "Config")
        assert ties_embedding({"architectures": [name]}) == config_class().tie_word_embeddings
        for is_tied in (True, False):
            asked = {"architectures": [name], "tie_word_embeddings": is_tied}
            assert ties_embedding(asked) == is_tied


@BOTH_FORMATS
@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.self_attn.q_proj.bias",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(name: str, output_format: Format, tmp_path: Path) -> None:
    whole = save_model("qwen2 untied", tmp_path / "whole").folder
    folder = changed_copy(whole, tmp_path / "model", lambda weights: weights.pop(name))
    assert f"tensors are missing: {name};" in refusal(folder, output_format, tmp_path)


@BOTH_FORMATS
def test_every_fault_is_told_in_one_line_and_many_are_counted(
    tiny_folder: Path, output_format: Format, tmp_path: Path
) -> None:
    def spoil(weights: Weights) -> None:
        for name in [name for name in weights if "self_attn" in name]:
            del weights[name]
        weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 128)
        weights["model.layers.1.mlp.gate_proj.scale"] = torch.ones(1)
        weights["model.norm.weight"][3] = torch.nan

    folder = changed_copy(tiny_folder, tmp_path / "model", spoil)
    (folder / "chat_template.jinja").write_text("{% for")
    said = refusal(folder, output_format, tmp_path)
    assert "model.layers.0.self_attn.v_proj.weight and 9 more; " in said
    assert "model.layers.0.mlp.up_proj.weight is [64, 128], by config.json [128, 64]; " in said
    assert "no LlamaForCausalLM with this config.json has model.layers.1.mlp.gate_proj" in said
    assert "model.norm.weight hold NaN or infinity; " in said
    assert "the chat template is malformed" in said


@BOTH_FORMATS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_no_number_is_found_where_no_probe_looks(
    value: float, tiny_folder: Path, output_format: Format, tmp_path: Path
) -> None:
    def spoil(weights: Weights) -> None:
        weights["model.embed_tokens.weight"][-1, 5] = value  # a row of no token
        weights["model.layers.2.mlp.down_proj.weight"][3, 7] = value

    said = refusal(changed_copy(tiny_folder, tmp_path / "model", spoil), output_format, tmp_path)
    assert "model.embed_tokens.weight, model.layers.2.mlp.down_proj.weight hold NaN" in said


def test_large_numbers_are_numbers(tiny_folder: Path, tmp_path: Path) -> None:
    def enlarge(weights: Weights) -> None:
        weights["model.embed_tokens.weight"].fill_(3e38)  # their sum is beyond float32

    checkpoint = open_checkpoint(changed_copy(tiny_folder, tmp_path / "model", enlarge))
    assert checkpoint.rows("model.embed_tokens.weight").max() > 2e38
    assert checkpoint.tensor("model.embed_tokens.weight").max() > 2e38
    assert checkpoint.faulty_values() is None


@BOTH_FORMATS
def test_layers_beyond_those_of_the_config_are_refused(
    tiny_folder: Path, output_format: Format, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    said = refusal(folder, output_format, tmp_path)
    assert "has model.layers.2.input_layernorm.weight" in said and "and 6 more" in said


@BOTH_FORMATS
def test_what_follows_from_the_rest_is_left_out(
    tiny_folder: Path, output_format: Format, tmp_path: Path
) -> None:
    """Rotary frequencies of old checkpoints, and a second copy of the tied embedding."""

    def add(weights: Weights) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    folder = changed_copy(tiny_folder, tmp_path / "model", add)
    report = export_model(str(folder), output_format, tmp_path / "out")
    assert report["equal_matrices"] == 3 * 7 + 1


@BOTH_FORMATS
def test_an_unknown_architecture_is_refused_with_those_known(
    tiny_folder: Path, output_format: Format, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["OtherModel"]}))
    said = refusal(folder, output_format, tmp_path)
    assert "OtherModel" in said and "supported are LlamaForCausalLM, MistralForCausalLM" in said


@BOTH_FORMATS
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for message in messages %}", "the chat template is malformed: "),
        ("{{ raise_exception('never') }}", "the chat template refuses these messages: never"),
        ("{{ messages[0].text.strip() }}", "refuses these messages: "),
        ("{{ 1 // 0 }}", "refuses these messages: "),
        ("{{ messages[0]['role'] | fitting }}", "the chat template is malformed: "),
    ],
)
def test_a_chat_template_that_does_not_render_is_refused(
    template: str, reason: str, tiny_folder: Path, output_format: Format, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text(template)
    assert reason in refusal(folder, output_format, tmp_path)


def _with_splitter(folder: Path, pattern: str) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    save_tokenizer(save_tiny_model(folder), tokenizer)
    return folder


def test_an_unknown_splitter_is_refused_where_the_engine_has_its_own(tmp_path: Path) -> None:
    """llama.cpp compiles splitters in; an ONNX folder carries tokenizer.json, which is run."""
    folder = _with_splitter(tmp_path / "model", "[aeiou]+|[^aeiou]+")
    said = refusal(folder, "gguf", tmp_path)
    assert "no splitter of llama.cpp" in said and "known are gpt-2, smollm, llama-bpe" in said
    export_model(str(folder), "onnx", tmp_path / "onnx")
    ours, theirs = FileTokenizer(tmp_path / "onnx"), FileTokenizer(folder)
    assert all(ours.encode(text) == theirs.encode(text) for text in PROBE_TEXTS)


@BOTH_FORMATS
def test_a_pre_tokenizer_that_nothing_runs_is_refused(
    tiny_folder: Path, output_format: Format, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["pre_tokenizer"] = {"type": "Unheard"}
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    assert "tokenizer.json" in refusal(folder, output_format, tmp_path)
