import mmap
import re
import threading
from collections.abc import Iterator
from ctypes import addressof, c_char
from pathlib import Path

import pytest

from edgekd.runtime import huge_pages
from edgekd.runtime.huge_pages import collapse, filled_ranges, in_huge_pages

_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_huge_pages = pytest.mark.skipif(
    not _MODE.exists() or "[never]" in _MODE.read_text(), reason="this system gives no huge pages"
)
SIZE_BYTES = 16 << 20


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    """Memory that nobody has touched."""
    with mmap.mmap(-1, SIZE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        yield mapped


def address_of(memory: mmap.mmap) -> int:
    view = c_char.from_buffer(memory)
    return addressof(view)


def huge_bytes(first: int) -> int:
    """Return how much of the mapping at ``first`` lies in huge pages, by the system's word."""
    for entry in re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M
    ):
        start, _, end = entry.split(" ", 1)[0].partition("-")
        if end and int(start, 16) <= first < int(end, 16):
            found = re.search(r"^AnonHugePages: +(\d+) kB$", entry, re.M)
            return int(found[1]) * 1024 if found else 0
    return 0


def wait_for_gathering() -> None:
    for thread in threading.enumerate():
        if thread.name == "huge pages":
            thread.join()


@needs_huge_pages
def test_what_a_block_fills_is_gathered_and_stays_what_it_is(memory: mmap.mmap) -> None:
    content = bytes(range(256)) * (SIZE_BYTES // 2 // 256)
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # or a system that always gives them would do it
    with in_huge_pages():
        memory.write(content)
        memory.madvise(mmap.MADV_HUGEPAGE)
    wait_for_gathering()
    assert huge_bytes(address_of(memory)) >= SIZE_BYTES // 2 - (4 << 20)
    assert memory[: len(content)] == content


@needs_huge_pages
def test_what_was_there_before_is_left_alone(memory: mmap.mmap) -> None:
    memory.write(bytes(SIZE_BYTES))
    before = huge_bytes(address_of(memory))
    with in_huge_pages():
        memory[0] = 1
    wait_for_gathering()
    assert huge_bytes(address_of(memory)) == before


@needs_huge_pages
def test_what_is_hardly_used_is_not_filled(memory: mmap.mmap) -> None:
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    half = SIZE_BYTES // 2
    memory.write(bytes(half))
    for place in range(half, SIZE_BYTES, 8 * mmap.PAGESIZE):
        memory[place] = 1
    first = address_of(memory)
    found = [start for start, _ in filled_ranges() if first <= start < first + SIZE_BYTES]
    assert found
    assert max(found) < first + half


@needs_huge_pages
def test_memory_that_is_gone_is_left_out() -> None:
    before = set(filled_ranges())
    with mmap.mmap(-1, SIZE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        mapped.write(bytes(SIZE_BYTES))
        found = [each for each in filled_ranges() if each not in before]
        assert len(found) >= SIZE_BYTES // (found[0][1] - found[0][0]) - 2
    gone = [each for each in found if each not in set(filled_ranges())]
    assert gone
    assert collapse(gone) == 0


@pytest.mark.parametrize(
    ("name", "place"), [("_SIZE", "no such file"), ("_PAGE_MAP", ".")], ids=["missing", "hidden"]
)
def test_where_the_system_does_not_tell_nothing_happens(
    name: str, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huge_pages, name, tmp_path / place)  # a folder cannot be opened
    n_threads = threading.active_count()
    with in_huge_pages():
        kept = bytearray(SIZE_BYTES)
    assert filled_ranges() == []
    assert threading.active_count() == n_threads
    assert len(kept) == SIZE_BYTES
