import os
import sys
from pathlib import Path

import pytest

from edgekd.devices.reading import Reading
from edgekd.runtime.page_cache import drop, is_cold, model_files, resident_share

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mincore and fadvise of Linux")


def test_a_dropped_file_is_out_of_memory_until_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(4_000_000))
    assert resident_share([file]).value == 1.0
    assert drop([file]) is None
    dropped = resident_share([file])
    if not is_cold(dropped):
        pytest.skip("this file system keeps its pages (tmpfs does)")
    with open(file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        opened.seek(2_000_000)
        os.read(opened.fileno(), 1)
    assert 0 < (resident_share([file]).value or 0.0) < 0.5
    file.read_bytes()
    assert resident_share([file]).value == 1.0


def test_the_files_of_a_folder_and_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "empty").touch()
    assert [file.name for file in model_files(tmp_path)] == ["empty", "one"]
    assert model_files(tmp_path / "one") == [tmp_path / "one"]
    assert resident_share(model_files(tmp_path)).value == 1.0


def test_what_is_not_there_has_a_reason(tmp_path: Path) -> None:
    assert "cannot drop" in (drop([tmp_path / "none"]) or "")
    share = resident_share([tmp_path / "none"])
    assert share.value is None and "none" in (share.reason or "")
    assert is_cold(share) is None


def test_a_few_pages_that_stay_are_still_cold() -> None:
    assert is_cold(Reading.measured(0.005, "share", "mincore"))
    assert not is_cold(Reading.measured(0.5, "share", "mincore"))
