from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgekd.distill.data import Document, read_documents
from edgekd.distill.importance import measure_importance
from edgekd.distill.prune import write_pruned
from edgekd.distill.student_shape import (
    Kept,
    Sizes,
    choose,
    choose_layers,
    count_parameters,
    sizes_of,
    sizes_within,
)
from edgekd.errors import RecipeError
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.export_model import export_model
from edgekd.runtime.tokenizer import FileTokenizer
from tests.conftest import TEXTS, save_tiny_model
from tests.export.tiny_models import save_model


@pytest.fixture
def documents(tiny: Checkpoint, tmp_path: Path) -> list[Document]:
    (tmp_path / "text").write_text(TEXTS[0])
    return read_documents([str(tmp_path / "text")], FileTokenizer(tiny.folder), None)


def test_influence_is_one_minus_the_cosine_of_hidden_states(
    tiny: Checkpoint, documents: list[Document]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    states = model(torch.tensor([documents[0].ids]), output_hidden_states=True).hidden_states
    expected = 1 - torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1).mean().item()
    found = measure_importance(tiny, documents)
    assert found.layers_L[0] == pytest.approx(expected, abs=1e-6)


def test_parts_that_do_nothing_are_the_least_important(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[5] = 0  # neuron 5
            layer.self_attn.v_proj.weight[16:] = 0  # group 1 of 2
            layer.input_layernorm.weight[7] = 0  # hidden channel 7
            layer.post_attention_layernorm.weight[7] = 0
    model.save_pretrained(folder)
    found = measure_importance(open_checkpoint(folder), [Document([3, 50, 90, 7], [True] * 4)])
    assert found.neurons_LI.argmin(1).tolist() == [5, 5, 5]
    assert found.groups_LG.argmin(1).tolist() == [1, 1, 1]
    assert found.hidden_H.argmin() == 7


def test_the_least_influential_layers_go_first() -> None:
    assert choose_layers([0.5, 0.1, 0.9, 0.2], 2) == [0, 2]
    with pytest.raises(RecipeError, match="cannot keep 5 of 4"):
        choose_layers([0.5, 0.1, 0.9, 0.2], 5)


def test_a_pruned_student_is_a_plain_checkpoint_with_the_kept_layers(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    write_pruned(tiny, Kept([0, 2]), tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert len(student.model.layers) == 2
    kept = student.model.layers[1].mlp.up_proj.weight
    assert kept.equal(tiny.tensor("model.layers.2.mlp.up_proj.weight"))


@pytest.mark.parametrize("layers", [[], [2, 0], [0, 0], [3], [-1]])
def test_layers_that_are_no_choice_are_refused(
    layers: list[int], tiny: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="no ascending choice"):
        write_pruned(tiny, Kept(layers), tmp_path / "student")


def test_dropping_parts_that_do_nothing_changes_no_logit(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 32:] = 0
            layer.self_attn.o_proj.weight[:, 32:] = 0  # heads 2 and 3, group 1
    model.save_pretrained(folder)
    neurons = [list(range(32))] * 3
    kept = Kept([0, 1, 2], None, neurons, [[0]] * 3)
    write_pruned(open_checkpoint(folder), kept, tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert student.config.num_attention_heads == 2 and student.config.head_dim == 16
    ids = torch.tensor([[5, 9, 33, 120]])
    torch.testing.assert_close(student(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["phi3", "phi4"])
def test_matrices_that_lie_in_one_tensor_are_cut_one_by_one(name: str, tmp_path: Path) -> None:
    checkpoint = save_model(name, tmp_path / "model", num_key_value_heads=2, num_attention_heads=4)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    n_neurons, head = model.config.intermediate_size, checkpoint.head_dim
    neurons, idle = list(range(32, n_neurons)), list(range(32))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, idle] = 0
            layer.self_attn.o_proj.weight[:, : 2 * head] = 0  # heads 0 and 1, group 0
    model.save_pretrained(checkpoint.folder)
    checkpoint = open_checkpoint(checkpoint.folder)
    importance = measure_importance(checkpoint, [Document([3, 50, 90, 7], [True] * 4)])
    layers = list(range(checkpoint.n_layers))
    kept = Kept(layers, None, [neurons] * len(layers), [[1]] * len(layers))
    write_pruned(checkpoint, kept, tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    ids = torch.tensor([[5, 9, 33, 120]])
    torch.testing.assert_close(student(ids).logits, model(ids).logits)

    sizes = replace(sizes_of(checkpoint), hidden=checkpoint.config["hidden_size"] // 2, groups=1)
    narrow = choose(importance, sizes)
    write_pruned(checkpoint, narrow, tmp_path / "narrow")
    assert open_checkpoint(tmp_path / "narrow").n_parameters == count_parameters(checkpoint, sizes)
    AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")(ids)


def test_a_narrow_student_runs_everywhere(
    tiny: Checkpoint, documents: list[Document], tmp_path: Path
) -> None:
    sizes = Sizes(layers=2, hidden=32, neurons=96, groups=1, heads_per_group=2)
    kept = choose(measure_importance(tiny, documents), sizes)
    write_pruned(tiny, kept, tmp_path / "student")
    student = open_checkpoint(tmp_path / "student")
    assert sizes_of(student) == sizes
    assert student.n_parameters == count_parameters(tiny, sizes)
    report = export_model(str(student.folder), "gguf", tmp_path / "student.gguf", quant="q4_0")
    assert report["arithmetic"]["kl_nats"] < 0.02


@pytest.mark.parametrize("way", ["depth", "width", "both"])
def test_a_parameter_budget_is_kept_and_used(way: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", n_layers=8, hidden_size=256, intermediate_size=768)
    checkpoint = open_checkpoint(folder)
    full = checkpoint.n_parameters
    assert sizes_within(checkpoint, full, way) == sizes_of(checkpoint)  # type: ignore[arg-type]
    sizes = sizes_within(checkpoint, int(0.7 * full), way)  # type: ignore[arg-type]
    assert 0.62 * full < count_parameters(checkpoint, sizes) <= 0.7 * full
    assert (sizes.layers == 8) == (way == "width") and (sizes.hidden == 256) == (way == "depth")
    with pytest.raises(RecipeError, match="too small a target"):
        sizes_within(checkpoint, 10, way)  # type: ignore[arg-type]


def test_a_latency_becomes_a_size_in_proportion_to_the_bytes_read(tiny: Checkpoint) -> None:
    from edgekd.distill.latency import bytes_read, measure_ms, sizes_for_latency
    from edgekd.progress import Silence

    full = bytes_read(tiny, sizes_of(tiny))
    one_layer = bytes_read(tiny, replace(sizes_of(tiny), layers=1))
    measured_ms = measure_ms(tiny, Silence())
    assert measured_ms > 0 and one_layer < full
    assert sizes_for_latency(tiny, 1e6, "depth") == sizes_of(tiny)
    with pytest.raises(RecipeError, match="too small a target"):
        sizes_for_latency(tiny, 1e-9, "depth")


def test_a_hidden_size_that_transformers_refuses_is_refused_here(
    tiny: Checkpoint, documents: list[Document]
) -> None:
    importance = measure_importance(tiny, documents)
    with pytest.raises(RecipeError, match="no multiple of 4 attention heads"):
        choose(importance, replace(sizes_of(tiny), hidden=33))
