import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from edgekd.distill.cross_tokenizer import align, learn_where_aligned, measure_ranks
from edgekd.distill.data import Document
from edgekd.distill.distill import distill
from edgekd.distill.loss_options import LossOptions
from edgekd.distill.packing import IGNORED, labels_of, pack
from edgekd.distill.recipe import Job, Recipe
from edgekd.errors import VocabularyError
from edgekd.runtime.tokenizer import FileTokenizer
from tests.conftest import TEXTS, make_tokenizer, save_tiny_model, save_tokenizer
from tests.export.tiny_tokenizers import save_pieces

BOS, EOS = "<|im_start|>", "<|im_end|>"


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


def _marking(folder: Path, form: str) -> FileTokenizer:
    """Return the tiny tokenizer, one that puts BOS or EOS around each text as ``form`` says."""
    folder.mkdir()
    tokenizer = make_tokenizer()
    ids = [(mark, tokenizer.token_to_id(mark)) for mark in (BOS, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=ids)
    save_tokenizer(folder, tokenizer)
    return FileTokenizer(folder)


@pytest.mark.parametrize("theirs", ["$A", f"{BOS} $A", f"$A {EOS}", f"{BOS} {BOS} $A {EOS}"])
@pytest.mark.parametrize("ours", ["$A", f"{BOS} $A", f"{BOS} $A {EOS}"])
def test_special_tokens_shift_nothing(ours: str, theirs: str, tmp_path: Path) -> None:
    student, teacher = _marking(tmp_path / "ours", ours), _marking(tmp_path / "theirs", theirs)
    ids = student.encode(TEXTS[2])
    found = align(Document(ids, [True] * len(ids)), student, teacher)
    n_before = [form.split().index("$A") for form in (ours, theirs)]
    n_text = len(student.encode(TEXTS[2], add_special=False))
    assert found.teacher_ids == teacher.encode(TEXTS[2])
    text_places = found.teacher_of[n_before[0] : n_before[0] + n_text]
    assert text_places == [n_before[1] + position for position in range(n_text)]
    if n_before[0]:  # the first token follows from BOS, where both have one
        assert found.teacher_of[0] == (n_before[1] - 1 if n_before[1] else None)
    assert set(found.teacher_of[n_before[0] + n_text :]) <= {None}  # the teacher reads no EOS there


def test_a_special_token_within_the_text_has_no_teacher(tiny_folder: Path, coarse: Path) -> None:
    student, teacher = FileTokenizer(coarse), FileTokenizer(tiny_folder)
    ids = student.encode(f"a dog{EOS} a fox")
    found = align(Document(ids, [True] * len(ids)), student, teacher)
    assert found.teacher_ids == teacher.encode("a dog a fox")
    assert found.teacher_of[ids.index(student.special_id("eos") or 0)] is None
    assert found.teacher_of[-1] == len(found.teacher_ids) - 1


def test_a_mark_of_the_teachers_alone_is_text_to_it(tmp_path: Path, tiny_folder: Path) -> None:
    save_pieces(tmp_path, adds_space_prefix=True)
    student, teacher = FileTokenizer(tiny_folder), FileTokenizer(tmp_path)
    ids = student.encode("a <s> b")
    found = align(Document(ids, [True] * len(ids)), student, teacher)
    assert found.teacher_ids.count(teacher.special_id("bos") or 0) == 1
    assert found.teacher_of[-1] == len(found.teacher_ids) - 1


@pytest.mark.parametrize("adds_space_prefix", [False, True])
def test_the_space_before_a_text_of_pieces_shifts_nothing(
    adds_space_prefix: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    save_pieces(tmp_path, adds_space_prefix=adds_space_prefix)
    student, teacher = FileTokenizer(tiny_folder), FileTokenizer(tmp_path)
    ids = student.encode(TEXTS[0])
    found = align(Document(ids, [True] * len(ids)), student, teacher)
    n_added = int(adds_space_prefix)
    n_aligned = 0
    for position, place in enumerate(found.teacher_of):
        if place is not None:
            read = b"".join(map(student.token_bytes, ids[: position + 1]))
            there = b"".join(map(teacher.token_bytes, found.teacher_ids[: place + 1]))
            assert read == there[n_added:]
            n_aligned += 1
    assert n_aligned > 10 and found.teacher_of[-1] == len(found.teacher_ids) - 1


def test_a_cut_within_a_character_shifts_nothing(tiny_folder: Path, coarse: Path) -> None:
    student, teacher = FileTokenizer(coarse), FileTokenizer(tiny_folder)
    ids = student.encode("\U0001f389 the dogs bark \U0001f389")
    first_bytes = [student.token_bytes(token)[0] for token in ids]
    assert first_bytes[1] & 0xC0 == 0x80  # the first character has several tokens
    cut_ids = ids[1:-1]  # begins and ends within one
    found = align(Document(cut_ids, [True] * len(cut_ids)), student, teacher)
    assert found.teacher_ids == teacher.encode(" the dogs bark ")
    read = b""
    for token, place in zip(cut_ids, found.teacher_of, strict=True):
        read += student.token_bytes(token)
        if place is not None:
            there = b"".join(map(teacher.token_bytes, found.teacher_ids[: place + 1]))
            assert read.lstrip(b"\x80\x89\x8e\x9f") == there
    assert len(found.teacher_ids) - 1 in found.teacher_of


def test_positions_without_a_teacher_are_not_counted(
    tiny_folder: Path, coarse: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(TEXTS))
    recipe = Recipe(
        steps=1,
        rows_per_step=1,
        row_tokens=512,
        precision="fp32",
        compile="none",
        cross_tokenizer="ranks",
    )
    job = Job(teacher=str(tiny_folder), student=str(coarse), data=[str(text)], recipe=recipe)
    distill(job, tmp_path / "out")
    logged = json.loads((tmp_path / "out" / "training_log.jsonl").read_text().splitlines()[0])

    student, teacher = FileTokenizer(coarse), FileTokenizer(tiny_folder)
    read = [student.encode(text.strip()) for text in TEXTS]
    documents = [Document(ids, [True] * len(ids)) for ids in read]
    places = [
        place
        for document in documents
        for place in align(document, student, teacher).teacher_of[:-1]
    ]
    n_aligned = sum(place is not None for place in places)
    assert n_aligned < len(places)
    assert logged["tokens"] == n_aligned
    assert logged["loss"] == pytest.approx(logged["divergence_nats"], rel=1e-4)


def test_data_on_which_the_two_never_agree_is_refused(tiny_folder: Path, coarse: Path) -> None:
    student, teacher = FileTokenizer(coarse), FileTokenizer(tiny_folder)
    ids = student.encode("\U0001f389")[1:]  # no whole character
    samples = [Document(ids, [True] * len(ids))]
    assert labels_of(samples[0]) != [IGNORED] * len(ids)
    with pytest.raises(VocabularyError, match="never end a token at the same byte"):
        learn_where_aligned(samples, pack(samples, 8), student, teacher)


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
