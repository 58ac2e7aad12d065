"""Weights in huge pages (2 MiB instead of 4 KiB on most processors), where Linux has them.

Each token reads all weights of a model once, so a processor looks the address of every page up
anew: some 20,000 lookups for 80 MB. Engines allocate without asking for huge pages, and most
systems give them only to who asks (transparent_hugepage/enabled: madvise). What is already there
can still be gathered, by MADV_COLLAPSE: see madvise(2), Linux 6.1 or later.

    with in_huge_pages():
        ...                # load the model
"""

import ctypes
import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path

Range = tuple[int, int]
"""First address, and the one behind the last."""

_MADV_COLLAPSE = 25
_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MAPS, _PAGE_MAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
_ENTRY_BYTES = 8
_MIN_RESIDENT_SHARE = 0.9
"""Of a range: gathering fills what is missing, and memory is what small devices lack."""


@contextmanager
def in_huge_pages() -> Iterator[None]:
    """Gather what the block fills and keeps; a thread does it, and nobody waits for it.

    A wish: where the system has no huge pages, or no such call, nothing changes.
    """
    before = set(filled_ranges())
    yield
    found = [each for each in filled_ranges() if each not in before]
    if found:
        threading.Thread(target=collapse, args=(found,), name="huge pages", daemon=True).start()


def collapse(ranges: Sequence[Range]) -> int:
    """Make each of ``ranges`` a huge page; return how many were made.

    They are of those that :func:`filled_ranges` returns. What is gone by now is left out.
    """
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return sum(advise(first, end - first, _MADV_COLLAPSE) == 0 for first, end in ranges)


def filled_ranges() -> list[Range]:
    """Return what of this process's own memory could be huge pages and is mostly there.

    Nothing where the system does not tell: it is no Linux, or hides it from the process.
    """
    try:
        with _PAGE_MAP.open("rb", buffering=0) as page_map:
            return [
                each
                for each in _huge_ranges(int(_SIZE.read_text()))
                if _resident_share(page_map, *each) >= _MIN_RESIDENT_SHARE
            ]
    except OSError:
        return []


def _huge_ranges(size: int) -> Iterator[Range]:
    """Yield each range that a huge page of ``size`` bytes could be."""
    for line in _MAPS.read_text().splitlines():
        addresses, permissions, _, _, _, *name = line.split()
        if permissions == "rw-p" and name in ([], ["[heap]"]):  # no file's, and no stack
            first, end = (int(address, 16) for address in addresses.split("-"))
            start = -(-first // size) * size
            yield from ((at, at + size) for at in range(start, end - size + 1, size))


def _resident_share(page_map: RawIOBase, first: int, end: int) -> float:
    """Return how much of a range is in memory: bit 63 of its entries in the page map."""
    n_pages = (end - first) // mmap.PAGESIZE
    page_map.seek(first // mmap.PAGESIZE * _ENTRY_BYTES)
    entries = page_map.read(n_pages * _ENTRY_BYTES) or b""
    return sum(byte >> 7 for byte in entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES]) / n_pages
