import mmap
from pathlib import Path

import psutil
import pytest

from edgekd.devices.memory import current_memory, peak_rss_bytes

HAS_ROLLUP = Path("/proc/self/smaps_rollup").exists()


def test_the_peak_remembers_memory_that_was_given_back() -> None:
    before = peak_rss_bytes()
    resident = psutil.Process().memory_info().rss
    block = b"x" * (before - resident + 50_000_000)
    del block
    assert peak_rss_bytes() >= before + 40_000_000


def test_the_parts_are_those_of_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "proc/self"
    folder.mkdir(parents=True)
    sizes = {"Rss": 100, "Shared_Clean": 30, "Shared_Dirty": 5, "Private_Clean": 25}
    sizes |= {"Private_Dirty": 40, "Anonymous": 45}
    lines = [f"{name}:   {size} kB" for name, size in sizes.items()]
    (folder / "smaps_rollup").write_text("\n".join(["56-7f ---p 0 00:00 0 [rollup]", *lines]))
    found = {name: reading.value for name, reading in current_memory(tmp_path).items()}
    assert found["private_bytes"] == 65 * 1024
    assert found["shared_bytes"] == 35 * 1024
    assert found["mapped_file_bytes"] == 55 * 1024


def test_a_system_without_the_file_gives_reasons_and_no_zeros(tmp_path: Path) -> None:
    found = current_memory(tmp_path)
    assert set(found) >= {"private_bytes", "shared_bytes", "mapped_file_bytes"}
    for reading in found.values():
        assert (reading.value, reading.status) == (None, "unavailable")
        assert "smaps_rollup" in (reading.reason or "")


@pytest.mark.skipif(not HAS_ROLLUP, reason="needs /proc/self/smaps_rollup")
def test_a_mapped_file_is_told_from_memory_of_our_own(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * 80_000)
    before = current_memory()["mapped_file_bytes"].value or 0
    with open(file, "rb") as source:
        mapped = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
    assert sum(mapped[i] for i in range(0, len(mapped), 4096)) == 0
    after = current_memory()["mapped_file_bytes"].value or 0
    mapped.close()
    assert after - before > 15_000_000
