"""``edgekd eval`` from end to end, through the real entry point."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgekd.errors import DataError, RecipeError, VocabularyError
from edgekd.export.checkpoint import open_checkpoint
from edgekd.runtime.evaluate import EvalOptions, evaluate
from edgekd.runtime.identity import tokenizer_of, tokenizer_sha256, weights_sha256
from edgekd.runtime.model_kind import ModelKind, detect_kind
from edgekd.runtime.reference_pack import read_pack
from tests.conftest import TEXTS, make_tokenizer, save_tiny_model, save_tokenizer
from tests.export.tiny_models import save_model

QUESTIONS = [
    {"question": "Which animal jumps?", "choices": ["The fox", "The dog"], "answer": 0},
    {"question": "What barks?", "choices": ["56 foxes", "dogs", "a function"], "answer": 1},
    {"question": "What is a distribution?", "choices": ["a function", "a dog"], "answer": 0},
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(TEXTS), "utf-8")
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)), "utf-8")
    return path


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekd", "eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_all_engines_stand_side_by_side_and_a_pack_repeats_it(
    tiny_folder: Path,
    float_gguf: Path,
    float_onnx: Path,
    text: Path,
    questions: Path,
    tmp_path: Path,
) -> None:
    models = [tiny_folder, float_gguf, float_onnx]
    pack = tmp_path / "teacher.pack"
    against = ["--teacher", tiny_folder, "--text", text, "--tokens", 90, "--window", 32]
    asked = ["--questions", questions, "--shots", 1]
    done = _run(*models, *against, *asked, "--write-reference", pack, "--json")
    assert done.returncode == 0, done.stderr
    assert "text tiny" in done.stderr and "questions tiny" in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [one["engine"] for one in found["models"]] == ["torch", "llama.cpp", "onnxruntime"]
    for one in found["models"]:
        assert abs(one["text"]["to_teacher"]["kl_nats"]["value"]) < 1e-3
        assert one["text"]["perplexity"]["standard_error"] > 0
        assert one["questions"]["n_questions"] == 2
    assert len({json.dumps(one["questions"]) for one in found["models"]}) == 1
    again = _run(float_gguf, "--reference", pack, "--json", "--quiet")
    assert again.returncode == 0 and not again.stderr
    repeated = json.loads(again.stdout)["models"][0]["text"]
    assert repeated["perplexity"] == found["models"][1]["text"]["perplexity"]
    assert repeated["to_teacher"]["kl_kind"] == "lower bound"
    assert read_pack(pack).identity.teacher_sha256 == found["reference"]["weights_sha256"]


def test_the_table_shows_the_figures(float_gguf: Path, text: Path) -> None:
    done = _run(float_gguf, "--teacher", float_gguf, "--text", text, "--quiet")
    assert done.returncode == 0, done.stderr
    assert "KL to teacher, nats" in done.stdout and "0.00000" in done.stdout
    assert "100.00%" in done.stdout


def test_perplexity_needs_no_teacher(float_onnx: Path, text: Path) -> None:
    (found,) = evaluate([str(float_onnx)], EvalOptions(text=text, n_tokens=64)).models
    assert found.text and found.text.to_teacher is None
    assert found.text.perplexity.value > 1


@pytest.mark.parametrize("kind", ["float_gguf", "float_onnx"])
def test_files_for_devices_are_measured_without_torch(
    kind: str,
    tiny_folder: Path,
    text: Path,
    questions: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    pack = tmp_path / "pack"
    made = EvalOptions(teacher=str(tiny_folder), text=text, n_tokens=64, write_reference=pack)
    assert evaluate([], made).wrote == str(pack)
    arguments = ["edgekd", "eval", str(request.getfixturevalue(kind)), "--reference", str(pack)]
    arguments += ["--questions", str(questions), "--quiet"]
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'safetensors'):\n"
        "    sys.modules[name] = None\n"  # importing one of them fails
        f"sys.argv = {arguments!r}\n"
        "from edgekd.cli import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "at least" in done.stdout and "acc_norm" in done.stdout


def test_a_model_with_other_tokens_is_refused_with_both_hashes(
    float_gguf: Path, text: Path, tmp_path: Path
) -> None:
    other = save_tiny_model(tmp_path / "other")
    save_tokenizer(other, make_tokenizer(380))
    pack = tmp_path / "pack"
    options = EvalOptions(teacher=str(other), text=text, n_tokens=64, write_reference=pack)
    evaluate([], options)
    hashes = [
        tokenizer_sha256(tokenizer_of(detect_kind(path), path)) for path in (float_gguf, other)
    ]
    for asked in (EvalOptions(reference=pack), options):
        with pytest.raises(VocabularyError, match=" and ".join(hashes)):
            evaluate([str(float_gguf)], asked)


@pytest.mark.parametrize("family", ["llama tied", "gemma3"])
def test_every_format_of_a_model_has_its_token_hash(family: str, tmp_path: Path) -> None:
    from tests.conftest import make_gguf, make_onnx

    checkpoint = save_model(family, tmp_path / "model")
    paths = [
        checkpoint.folder,
        make_gguf(checkpoint, "f32", tmp_path),
        make_onnx(checkpoint, "f32", tmp_path),
    ]
    assert len({tokenizer_sha256(tokenizer_of(detect_kind(path), path)) for path in paths}) == 1


def test_weights_are_known_by_the_hash_that_manifests_record(tiny_folder: Path) -> None:
    expected = open_checkpoint(tiny_folder).weights_sha256()
    assert weights_sha256(ModelKind.CHECKPOINT, tiny_folder) == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"teacher": "t"}, "--teacher needs --text"),
        ({"reference": Path("p"), "text": Path("t")}, "leave out --teacher and --text"),
        ({"write_reference": Path("p")}, "--write-reference needs --teacher"),
        ({}, "nothing to measure"),
        ({"text": Path("t"), "shots": 2}, "in front of --questions"),
        ({"text": Path("t"), "n_tokens": 1}, "--tokens 1 is too small"),
    ],
)
def test_contradictions_are_refused_before_anything_runs(
    options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RecipeError, match=reason):
        evaluate(["model"], EvalOptions(**options))


def test_all_faults_are_named_together() -> None:
    with pytest.raises(RecipeError, match=r"at least one MODEL.*; --tokens 0"):
        evaluate([], EvalOptions(n_tokens=0))


def test_a_text_that_cannot_be_read_is_refused(float_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    for name in ("missing", "binary"):
        with pytest.raises(DataError, match="cannot read text"):
            evaluate([str(float_gguf)], EvalOptions(text=tmp_path / name))
