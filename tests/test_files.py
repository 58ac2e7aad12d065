import errno
from pathlib import Path

import pytest

from edgekd.errors import OutputError, VerificationError
from edgekd.files import atomic_file, atomic_folder
from edgekd.manifest import check_files, read_manifest


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_exchanged_whole(tmp_path: Path) -> None:
    path = tmp_path / "result"
    for content in ("one", "two"):
        with atomic_folder(path) as partial:
            (partial / content).write_text(content)
    assert [entry.name for entry in path.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"), atomic_file(tmp_path / "file" / "x"):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("120 requested and 40 written"),  # numpy's tofile
        Exception("IoError(No space left on device (os error 28))"),  # safetensors, tokenizers
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_every_library_s_word_for_a_full_disk_is_understood(
    error: Exception, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="cannot write"), atomic_folder(tmp_path / "x"):
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(2, "gone", "/etc/other"), ValueError("bug"), TimeoutError("a server")],
)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)), atomic_folder(tmp_path / "x"):
        raise error


@pytest.mark.parametrize("content", ["", "[]", '{"schema_version": 1}', '{"files": {}}', "{"])
def test_a_foreign_manifest_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "edgekd.json"
    path.write_text(content)
    with pytest.raises(VerificationError, match="not an edgekd manifest"):
        read_manifest(path)


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    manifest = {"files": {"../../etc/passwd": {"sha256": "0"}}}
    with pytest.raises(VerificationError, match="is missing"):
        check_files(tmp_path, manifest)
