"""Multiple choice: equal to the plain way of scoring, by lm-evaluation-harness's conventions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgekd.errors import DataError, EngineError, RecipeError
from edgekd.runtime.choices import Answered, Question, answer, grade
from edgekd.runtime.continuations import Scored, Scorer, encode_pair
from edgekd.runtime.loading import LoadedModel, open_model
from edgekd.runtime.questions import read_questions, with_shots
from edgekd.runtime.tokenizer import FileTokenizer
from tests.conftest import save_tiny_model
from tests.export.tiny_models import save_model

QUESTIONS = [
    Question("The quick brown", (" fox jumps", " lazy dog over", " 1234 dogs bark"), 0),
    Question("The quick brown", (" foxes", " dogs bark at 56", " a"), 1),
    Question("A distribution is a", (" function", " probability of each outcome"), 1),
    Question("", ("The lazy dog", "def add(a, b)"), 0),
    Question("def add(a, b):\n    ", ("return a + b", "  lazy"), 0),
]


def _plain(folder: Path, context: list[int], ids: list[int]) -> float:
    """The plain way: one forward over the whole text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        log_p_TV = model(torch.tensor([context + ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_p_TV[len(context) + i - 1, token]) for i, token in enumerate(ids))


@pytest.fixture(params=["tiny_folder", "float_gguf", "float_onnx"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return open_model(request.getfixturevalue(request.param), context_tokens=64, n_threads=1)


def test_every_engine_scores_as_one_forward_over_the_whole_text(
    loaded: LoadedModel, tiny_folder: Path
) -> None:
    for found in answer(loaded, QUESTIONS):
        for text, scored in zip(found.question.choices, found.scored, strict=True):
            context, ids = encode_pair(loaded.tokenizer, found.question.context, text)
            assert scored.n_tokens == len(ids)
            assert scored.log_p == pytest.approx(_plain(tiny_folder, context, ids), abs=0.02)


def test_an_answer_is_chosen_by_the_length_it_is_divided_by() -> None:
    question = Question("q", (" aa", " \u00fc", " abcd"), 2)
    found = Answered(
        question, (Scored(-3.0, 1, False), Scored(-2.2, 3, False), Scored(-4, 4, True))
    )
    # -1.5, -2.2, -1; bytes: -1.5, -1.1, -1; tokens: -3, -0.73, -1.
    assert [found.chosen(norm) for norm in ("none", "chars", "bytes", "tokens")] == [1, 2, 2, 1]
    graded = grade([found, replace(found, question=replace(question, answer=1))])
    assert (graded.acc.value, graded.acc_norm.value, graded.acc_tokens.value) == (0.5, 0.5, 0.5)
    assert graded.acc.standard_error == pytest.approx(0.5)
    right = grade([replace(found, question=replace(question, answer=1))])
    assert (right.acc.value, right.acc_bytes.value) == (1, 0)


def test_bytes_and_characters_differ_outside_ascii() -> None:
    question = Question("q", (" \u65e5\u672c", " abcd"), 0)
    found = Answered(question, (Scored(-5.0, 1, False), Scored(-4.0, 1, False)))
    assert (found.chosen("chars"), found.chosen("bytes")) == (1, 0)


def test_blanks_at_the_end_of_a_context_go_to_the_continuation(tiny_folder: Path) -> None:
    tokenizer = FileTokenizer(tiny_folder)
    moved = encode_pair(tokenizer, "The quick  ", "brown")
    assert moved == encode_pair(tokenizer, "The quick", "  brown")
    assert moved[0] == tokenizer.encode("The quick")
    assert moved[0] + moved[1] == tokenizer.encode("The quick  brown")


def test_an_empty_context_is_the_token_that_texts_begin_after(tiny_folder: Path) -> None:
    tokenizer = FileTokenizer(tiny_folder)
    assert encode_pair(tokenizer, "", "fox") == ([1], tokenizer.encode("fox"))
    assert encode_pair(tokenizer, "", "<|im_start|>fox") == ([1], tokenizer.encode("fox"))
    with pytest.raises(DataError, match="no token of its own"):
        encode_pair(tokenizer, "fox", "")


def test_a_long_context_is_cut_on_the_left(loaded: LoadedModel, tiny_folder: Path) -> None:
    context = loaded.tokenizer.encode("The lazy dog and the quick brown fox. " * 9)
    ids = loaded.tokenizer.encode(" jumps over")
    assert len(context) > 64
    (found,) = Scorer(loaded.engine).score(context, [ids])
    kept = context[len(context) + len(ids) - 1 - 64 :]
    assert len(kept) + len(ids) - 1 == 64
    assert found.log_p == pytest.approx(_plain(tiny_folder, kept, ids), abs=0.02)


def test_a_continuation_that_leaves_no_room_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(EngineError, match="raise --ctx"):
        Scorer(loaded.engine).score([5, 6], [[7] * 65])


def test_greedy_is_what_the_model_would_write(loaded: LoadedModel) -> None:
    context = loaded.tokenizer.encode("The quick brown")
    first = int(loaded.engine.forward(context).argmax())
    second = int(loaded.engine.forward([first]).argmax())
    found = Scorer(loaded.engine).score(context, [[first, second], [first, second ^ 1]])
    assert [one.is_greedy for one in found] == [True, False]


class _Counting:
    """Counts the tokens that run through an engine."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.n_tokens = 0
        self._forward = loaded.engine.forward
        loaded.engine.forward = self.forward  # type: ignore[method-assign, assignment]

    def forward(self, ids: list[int], **options: bool) -> object:
        self.n_tokens += len(ids)
        return self._forward(ids, **options)


def test_a_context_runs_once_and_a_shared_beginning_stays(tiny_folder: Path) -> None:
    loaded = open_model(tiny_folder, context_tokens=64, n_threads=1)
    counted, scorer = _Counting(loaded), Scorer(loaded.engine)
    scorer.score([5, 6, 7, 8], [[9, 10, 11], [12, 13], [14]])
    assert counted.n_tokens == 4 + 2 + 1
    counted.n_tokens = 0
    scorer.score([5, 6, 7, 20, 21], [[9]])
    assert counted.n_tokens == 2
    scorer.score([5, 6], [[9]])  # the logits behind 6 were not kept: it runs again
    assert counted.n_tokens == 3


def test_a_sliding_window_cache_that_cannot_go_back_starts_over(tmp_path: Path) -> None:
    folder = save_model("gemma3", tmp_path).folder
    loaded = open_model(folder, context_tokens=64, n_threads=1)
    context, ids = list(range(5, 45)), [[50, 51, 52], [53, 54]]  # the window is 24 tokens
    found = Scorer(loaded.engine).score(context, ids)
    expected = [_plain(folder, context, one) for one in ids]
    assert [one.log_p for one in found] == pytest.approx(expected, abs=1e-3)


def _write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return path


def test_questions_are_asked_as_arc_or_as_they_stand(tmp_path: Path) -> None:
    asked = {"question": "Why?", "choices": ["so", "not so"], "answer": 1, "id": "x"}
    raw = {"context": "Q: why\nA:", "choices": [" so", "not"], "answer": 0}
    assert read_questions(_write(tmp_path / "q.jsonl", asked, raw)) == [
        Question("Question: Why?\nAnswer:", (" so", " not so"), 1),
        Question("Q: why\nA:", (" so", "not"), 0),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[1]", "a JSON object is needed"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', '"choices", a list of two'),
        ('{"question": "q", "choices": ["a", " "], "answer": 0}', '"choices", a list of two'),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "from 0 to 1"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "from 0 to 1"),
        ('{"question": 1, "choices": ["a", "b"], "answer": 0}', 'needs a "question"'),
    ],
)
def test_a_malformed_question_is_refused_by_its_line(
    line: str, reason: str, tmp_path: Path
) -> None:
    good = json.dumps({"question": "q", "choices": ["a", "b"], "answer": 0})
    path = tmp_path / "q.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=reason):
        read_questions(path)


def test_files_without_questions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DataError, match="no questions"):
        read_questions(tmp_path / "empty")
    with pytest.raises(DataError, match="cannot read"):
        read_questions(tmp_path / "missing")


def test_the_first_questions_are_examples_and_not_asked() -> None:
    asked = with_shots(QUESTIONS, 2)
    start = "The quick brown fox jumps\n\nThe quick brown dogs bark at 56\n\n"
    assert asked == [replace(one, context=start + one.context) for one in QUESTIONS[2:]]
    with pytest.raises(RecipeError, match="--shots 5 needs"):
        with_shots(QUESTIONS, 5)


def test_examples_of_another_file_are_drawn_by_the_seed_and_all_questions_asked() -> None:
    pool = [Question(f"q{i}", (" a", " b"), i % 2) for i in range(20)]
    drawn = [with_shots(QUESTIONS, 3, pool, seed)[0].context for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(with_shots(QUESTIONS, 3, pool)) == len(QUESTIONS)
    assert drawn[0].count("\n\n") == 3


def test_other_weights_give_other_scores(tiny_folder: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=5)
    one, two = (
        answer(open_model(folder, context_tokens=64), QUESTIONS[:1])[0].scored[0].log_p
        for folder in (tiny_folder, other)
    )
    assert abs(one - two) > 1e-3
