import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from edgekd.distill.data import Document
from edgekd.distill.distill import distill
from edgekd.distill.on_policy import (
    StudentWriter,
    prompt_of,
    sample_continuations,
    written_document,
)
from edgekd.distill.recipe import Job, Recipe
from edgekd.errors import RecipeError
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


def test_a_student_far_from_its_teacher_is_not_worth_scoring(
    tiny_folder: Path, tmp_path: Path
) -> None:
    job = _job(tiny_folder, tmp_path)
    job = replace(job, recipe=replace(job.recipe, force=False))
    with pytest.raises(RecipeError, match="train it on fixed data first"):
        distill(job, tmp_path / "out")
