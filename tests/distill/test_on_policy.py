import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from edgekd.distill.assemble import Text, make_writer
from edgekd.distill.data import Document, read_documents
from edgekd.distill.distill import distill
from edgekd.distill.on_policy import (
    StudentWriter,
    prompt_of,
    sample_continuations,
    written_document,
)
from edgekd.distill.packing import cut, pack
from edgekd.distill.recipe import Job, Recipe
from edgekd.errors import RecipeError
from edgekd.runtime.tokenizer import FileTokenizer
from tests.conftest import TEXTS, save_tiny_model


@given(
    continuation=st.lists(st.integers(0, 9), max_size=12),
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=5),
)
def test_nothing_after_the_first_stop_token_is_learned(
    continuation: list[int], prompt: list[int]
) -> None:
    document = written_document(prompt, continuation, frozenset({3, 7}))
    learned = [t for t, wanted in zip(document.ids, document.learned, strict=True) if wanted]
    assert document.ids[: len(prompt)] == prompt and not any(document.learned[: len(prompt)])
    assert learned == continuation[: len(learned)]
    assert not {3, 7} & set(learned[:-1])
    assert len(learned) == len(continuation) or learned[-1] in (3, 7)


def test_the_prompt_of_a_chat_is_all_before_the_reply_and_of_text_its_beginning() -> None:
    assert prompt_of(Document([1, 2, 3, 4], [False, False, True, True]), 1) == [1, 2]
    assert prompt_of(Document([1, 2, 3, 4], [True] * 4), 3) == [1, 2, 3]


def test_left_padding_changes_nothing(tiny_folder: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    prompts = [[5, 9, 33], [7, 120, 8, 44, 90, 12, 60]]
    near_greedy = 1e-3
    together = sample_continuations(student, prompts, 6, near_greedy, frozenset())
    singly = [sample_continuations(student, [p], 6, near_greedy, frozenset())[0] for p in prompts]
    assert together == singly


def test_sampling_has_the_asked_temperature_and_no_filter(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    config = {"top_k": 1, "temperature": 0.01, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(config))
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    found = sample_continuations(student, [[5, 9, 33]] * 600, 1, 1.5, frozenset())
    counts = torch.bincount(torch.tensor([d.ids[-1] for d in found]), minlength=405).double()
    expected = (student(torch.tensor([[5, 9, 33]])).logits[0, -1] / 1.5).softmax(-1).double()
    top = expected.topk(5).indices
    error = (expected[top] * (1 - expected[top]) / 600).sqrt()
    assert ((counts[top] / 600 - expected[top]).abs() < 4.5 * error).all()


def test_the_student_writes_at_the_temperature_of_the_loss(tiny_folder: Path) -> None:
    text = Text([], [], [], [], FileTokenizer(tiny_folder))
    for temperature in (1.0, 2.5):
        recipe = Recipe(on_policy=0.5, temperature=temperature)
        writer = make_writer(text, recipe, text.tokenizer)
        assert writer is not None and writer.temperature == temperature


def test_a_student_in_training_writes_as_it_does_at_rest(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", attention_dropout=0.5)
    prompts = [[5, 9, 33], [7, 120, 8, 44, 90, 12, 60]]
    written = []
    for is_training in (False, True):
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if is_training:
            student.activation_checkpointing_enable()  # no KV cache, while it trains
        student.train(is_training)
        torch.manual_seed(0)
        written.append(sample_continuations(student, prompts, 8, 1.0, frozenset()))
        assert student.training == is_training
    assert written[1] == written[0]


@given(sizes=st.lists(st.integers(1, 50), min_size=60, max_size=60), share=st.floats(0.1, 0.9))
def test_the_share_of_written_tokens_is_as_asked(sizes: list[int], share: float) -> None:
    writer = StudentWriter([], [], share, 8, 8, 32, 1.0, frozenset())
    for size in sizes:
        writer.count(size, is_written=writer.is_due())
    assert writer.n_written / writer.n_learned == pytest.approx(share, abs=50 / sum(sizes))


def _job(teacher: Path, tmp_path: Path, **changes: object) -> Job:
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(TEXTS * 6))
    settings = {
        "steps": 12,
        "row_tokens": 48,
        "learning_rate": 3e-3,
        "precision": "fp32",
        "divergence": "reverse_kl",
        "on_policy": 0.5,
        "on_policy_tokens": 12,
        "on_policy_prompt_tokens": 6,
        "eval_steps": 4,
        "force": True,
    }
    recipe = Recipe(**(settings | changes))  # type: ignore[arg-type]
    student = save_tiny_model(tmp_path / "student", seed=1, n_layers=2)
    return Job(
        teacher=str(teacher),
        student=str(student),
        data=[str(text)],
        eval_data=[str(text)],
        recipe=recipe,
    )


def test_the_reverse_kl_of_what_the_student_writes_falls(tiny_folder: Path, tmp_path: Path) -> None:
    distill(
        _job(tiny_folder, tmp_path, steps=24, eval_steps=8, learning_rate=1e-2), tmp_path / "out"
    )
    log = [
        json.loads(x) for x in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()
    ]
    found = [entry["eval_reverse_kl_nats"] for entry in log if "eval_reverse_kl_nats" in entry]
    assert len(found) == 3 and found[-1] < 0.9 * found[0]


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_a_run_writes_the_share_that_was_asked_for(
    share: float, tiny_folder: Path, tmp_path: Path
) -> None:
    job = _job(tiny_folder, tmp_path, on_policy=share, steps=24, eval_steps=0, compile="none")
    distill(replace(job, eval_data=[]), tmp_path / "out")
    lines = (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()
    log = [entry for line in lines if "tokens" in (entry := json.loads(line))]
    written, learned = ([entry[k] for entry in log] for k in ("written_tokens", "tokens"))
    assert sum(written) / sum(learned) == pytest.approx(share, abs=max(learned) / sum(learned))
    assert 0 < sum(map(bool, written)) < 24


def test_the_reverse_kl_is_that_of_held_out_prompts(tiny_folder: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("\n\n\n".join(text.upper() for text in TEXTS[:2]))
    job = _job(tiny_folder, tmp_path, steps=2, eval_steps=0, compile="none")
    job = replace(job, eval_data=[str(held_out)])
    found = distill(job, tmp_path / "out")["held_out"]["eval_reverse_kl_nats"]

    tokenizer = FileTokenizer(tiny_folder)
    documents = cut(read_documents([str(held_out)], tokenizer, None), 48)
    prompts = [prompt_of(documents[i], 6) for row in pack(documents, 48) for i in row.samples]
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (tmp_path / "out", tiny_folder)
    )
    torch.manual_seed(job.recipe.seed)
    written = sample_continuations(student, prompts, 12, 1.0, tokenizer.stop_ids)
    sums = []
    for document in written:
        log_q, log_p = (
            model(torch.tensor([document.ids])).logits[0, :-1, :400].log_softmax(-1)
            for model in (student, teacher)
        )
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        sums.append(kl[torch.tensor(document.learned[1:])].tolist())
    expected = [value for row in sums for value in row]
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-3)


def test_a_student_far_from_its_teacher_is_not_worth_scoring(
    tiny_folder: Path, tmp_path: Path
) -> None:
    job = _job(tiny_folder, tmp_path)
    job = replace(job, recipe=replace(job.recipe, force=False))
    with pytest.raises(RecipeError, match="train it on fixed data first"):
        distill(job, tmp_path / "out")
