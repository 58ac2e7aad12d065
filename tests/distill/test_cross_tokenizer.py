from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekd.distill.cross_tokenizer import align, measure_ranks
from edgekd.distill.data import Document
from edgekd.distill.distill import distill
from edgekd.distill.loss_options import LossOptions
from edgekd.distill.recipe import Job, Recipe
from edgekd.runtime.tokenizer import FileTokenizer
from tests.conftest import TEXTS, make_tokenizer, save_tiny_model, save_tokenizer


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with fewer tokens than the tiny teacher."""
    folder = save_tiny_model(tmp_path_factory.mktemp("coarse") / "model", seed=1, n_layers=2)
    save_tokenizer(folder, make_tokenizer(vocab_size=300))
    return folder


@given(text=st.text(min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_aligned_positions_have_read_the_same_bytes(
    text: str, tiny_folder: Path, coarse: Path
) -> None:
    student, teacher = FileTokenizer(coarse), FileTokenizer(tiny_folder)
    ids = student.encode(text)
    found = align(Document(ids, [True] * len(ids)), student, teacher)
    for position, place in enumerate(found.teacher_of):
        if place is not None:
            read = b"".join(map(student.raw_token_bytes, ids[: position + 1]))
            there = b"".join(map(teacher.raw_token_bytes, found.teacher_ids[: place + 1]))
            assert read == there
    assert found.teacher_of[-1] == len(found.teacher_ids) - 1  # both end where the text ends


def test_equal_tokenizers_align_everywhere(tiny_folder: Path) -> None:
    tokenizer = FileTokenizer(tiny_folder)
    ids = tokenizer.encode(TEXTS[2])
    found = align(Document(ids, [True] * len(ids)), tokenizer, tokenizer)
    assert found.teacher_ids == ids and found.teacher_of == list(range(len(ids)))


def test_value_and_gradient_are_those_of_sorted_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 40, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 60, generator=generator, dtype=torch.float64)
    q = student.softmax(-1).sort(-1, descending=True).values
    p = teacher.softmax(-1).sort(-1, descending=True).values
    rest = p[:, 40:].sum(-1)
    expected = ((q - p[:, :40]).abs().sum(-1) + rest) / 2
    expected.sum().backward()  # type: ignore[no-untyped-call]
    value, grad, _ = measure_ranks(student.detach(), teacher, LossOptions())
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(grad, student.grad)


def test_a_student_of_other_tokens_comes_closer_by_rank(
    tiny_folder: Path, coarse: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(f"{number} {text}" for number, text in enumerate(TEXTS * 8)))
    recipe = Recipe(
        steps=30,
        row_tokens=64,
        learning_rate=1e-2,
        precision="fp32",
        cross_tokenizer="ranks",
        eval_steps=10,
    )
    job = Job(
        teacher=str(tiny_folder),
        student=str(coarse),
        data=[str(text)],
        eval_data=[str(text)],
        recipe=recipe,
    )
    report = distill(job, tmp_path / "out")
    assert 0 < report["last"]["divergence_nats"] < 0.4
    assert report["held_out"]["eval_perplexity"] > 1
