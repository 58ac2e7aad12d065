"""The operating system's cache of file pages: what decides whether a load is cold or warm."""

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekd.devices.reading import Reading

_UNIT = "share of pages"
_COLD_SHARE = 0.01
"""A few pages stay where another process maps the file; below this a load is cold."""


def model_files(path: Path) -> list[Path]:
    """Return the files of the model at ``path``."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def drop(files: Sequence[Path]) -> str | None:
    """Ask the system to forget the pages of ``files``; return why it cannot, else None.

    It is a request, posix_fadvise(2): pages that are mapped or dirty stay. ``resident_share``
    says what came of it.
    """
    if not hasattr(os, "posix_fadvise"):
        return "this system has no posix_fadvise"
    try:
        for file in files:
            with open(file, "rb") as opened:
                os.fdatasync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        return f"cannot drop {file} from the page cache: {error}"
    return None


def resident_share(files: Sequence[Path]) -> Reading:
    """Return which share of the pages of ``files`` is in memory, by mincore(2)."""
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError, TypeError):
        return Reading.unavailable(_UNIT, "mincore", "this system has no mincore")
    n_pages = n_resident = 0
    for file in files:
        try:
            flags = _pages_of(file, mincore)
        except (OSError, ValueError) as error:
            return Reading.unavailable(_UNIT, "mincore", f"{file}: {error}")
        n_pages += len(flags)
        n_resident += sum(flag & 1 for flag in flags)
    return Reading.measured(n_resident / max(n_pages, 1), _UNIT, "mincore")


def is_cold(share: Reading) -> bool | None:
    """Return whether the files were out of memory; None where nobody can tell."""
    return None if share.value is None else share.value <= _COLD_SHARE


def _pages_of(file: Path, mincore: Any) -> bytes:
    """Return one byte for each page of ``file``; its lowest bit says that it is in memory."""
    size_bytes = file.stat().st_size
    if size_bytes == 0:
        return b""
    flags = (ctypes.c_ubyte * -(-size_bytes // mmap.PAGESIZE))()
    # A private writable mapping: only of such a one ctypes gives the address. Nothing is written.
    with (
        open(file, "rb") as opened,
        mmap.mmap(opened.fileno(), size_bytes, access=mmap.ACCESS_COPY) as mapped,
    ):
        anchor = ctypes.c_char.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(anchor))
        status = mincore(address, ctypes.c_size_t(size_bytes), flags)
        number = ctypes.get_errno()
        del anchor  # or the mapping cannot be closed
    if status != 0:
        raise OSError(number, os.strerror(number))
    return bytes(flags)
