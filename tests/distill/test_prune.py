from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgekd.distill.data import read_documents
from edgekd.distill.prune import block_influence, choose_layers, layers_within, write_pruned
from edgekd.errors import RecipeError
from edgekd.export.checkpoint import Checkpoint
from edgekd.runtime.tokenizer import FileTokenizer
from tests.conftest import TEXTS


def test_influence_is_one_minus_the_cosine_of_hidden_states(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text(TEXTS[0])
    documents = read_documents([str(tmp_path / "text")], FileTokenizer(tiny.folder), None)
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    states = model(torch.tensor([documents[0].ids]), output_hidden_states=True).hidden_states
    expected = 1 - torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1).mean().item()
    assert block_influence(tiny, documents)[0] == pytest.approx(expected, abs=1e-6)


def test_the_least_influential_layers_go_first() -> None:
    assert choose_layers([0.5, 0.1, 0.9, 0.2], 2) == [0, 2]
    with pytest.raises(RecipeError, match="cannot keep 5 of 4"):
        choose_layers([0.5, 0.1, 0.9, 0.2], 5)


def test_a_pruned_student_is_a_plain_checkpoint_with_the_kept_layers(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    write_pruned(tiny, [0, 2], tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert len(student.model.layers) == 2
    kept = student.model.layers[1].mlp.up_proj.weight
    assert kept.equal(tiny.tensor("model.layers.2.mlp.up_proj.weight"))


def test_a_parameter_budget_becomes_a_number_of_layers(tiny: Checkpoint) -> None:
    total = sum(torch.Size(tiny.shape(name)).numel() for name in tiny.shard_of)
    assert layers_within(tiny, total) == 3
    assert layers_within(tiny, total - 1) == 2
    with pytest.raises(RecipeError, match="hold no layer"):
        layers_within(tiny, 10)
