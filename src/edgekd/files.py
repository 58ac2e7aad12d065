"""Files that are either whole or absent: written beside their place, then renamed into it."""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from edgekd.errors import OutputError
from edgekd.units import format_bytes

_READ_BYTES = 1 << 20
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h
# What a full, read-only or broken disk says.
_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers
_TORCH_WRITE_FAULT = re.compile(r"PytorchStreamWriter|inline_container")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path``; rename it into place when the block succeeds.

    Raises:
        OutputError: the folder cannot be written, or the disk is full; ``path`` is as it was.
    """
    with _beside(path) as partial:
        yield partial
        _flush(partial)
        partial.replace(path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; it replaces ``path`` when the block succeeds.

    Raises:
        OutputError: the place cannot be written, or the disk is full; ``path`` is as it was.
    """
    with _beside(path) as partial:
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
        if path.exists():
            _exchange(partial, path)
        else:
            partial.rename(path)


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, "utf-8")


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of the file at ``path``."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_all(paths: Sequence[Path]) -> str:
    """Return one hash over files in their order: a file's own where there is only one."""
    hashes = [sha256_of(path) for path in paths]
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def size_of(path: Path) -> int:
    """Return the bytes of the file at ``path``, or of all files below it."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield an unused hidden name in the folder of ``path``; remove what is left there after."""
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        holder, unlock = _make_holder(path)
    except OSError as error:
        raise _output_error(path, error) from error
    try:
        with disk_errors(path, holder):
            yield holder / path.name
    finally:
        shutil.rmtree(holder, ignore_errors=True)
        unlock()


def _make_holder(path: Path) -> tuple[Path, Callable[[], None]]:
    """Make a hidden folder beside ``path``; return it, locked, and what unlocks it.

    The lock ends with this process, however it ends.
    """
    while True:
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        with suppress(OSError):  # a file system without locks
            unlock = _lock(holder)
            if holder.is_dir():
                return holder, unlock
            unlock()  # another run took it for a leftover before it was locked
            continue
        return holder, lambda: None


def _lock(folder: Path, *, wait: bool = True) -> Callable[[], None]:
    """Lock ``folder``, and return what unlocks it.

    Raises:
        OSError: another process holds it and we do not ``wait``, or there are no locks here.
    """
    if sys.platform == "win32":
        raise OSError("folders have no locks")
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        raise
    return lambda: os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove the hidden folders of runs that were killed while they wrote ``path``."""
    is_ours = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")  # as mkdtemp names them
    for found in path.parent.iterdir():
        if is_ours.fullmatch(found.name) and found.is_dir():
            with suppress(OSError):
                _remove_if_unused(found, path.name)


def _remove_if_unused(holder: Path, name: str) -> None:
    unlock = _lock(holder, wait=False)  # fails while its run is alive
    try:
        if {entry.name for entry in holder.iterdir()} <= {name}:
            shutil.rmtree(holder)
    finally:
        unlock()


@contextmanager
def disk_errors(path: Path, place: Path | None = None) -> Iterator[None]:
    """Turn what a full or broken disk makes of writing ``path`` into an OutputError.

    ``place`` is where the bytes go for now. Every library says it in its own way.

    Raises:
        OutputError: the disk refused.
    """
    try:
        yield
    except Exception as error:
        if _is_of_the_disk(error, place or path):
            raise _output_error(path, error) from error
        raise


def _is_of_the_disk(error: Exception, place: Path) -> bool:
    if isinstance(error, OSError):
        # numpy's tofile raises a bare OSError without an errno; network libraries derive theirs.
        is_bare = type(error) is OSError and error.errno is None
        is_anonymous = error.filename is None and (is_bare or error.errno in _DISK_ERRNOS)
        # Where a copy fails, shutil names its source first.
        names = [error.filename, error.filename2 if error.errno in _DISK_ERRNOS else None]
        return is_anonymous or any(str(name or "").startswith(str(place)) for name in names)
    if match := _RUST_ERRNO.search(str(error)):
        return int(match[1]) in _DISK_ERRNOS
    return isinstance(error, RuntimeError) and bool(_TORCH_WRITE_FAULT.search(str(error)))


def _output_error(path: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [repr(error)])[0]
    free = _free_space(path)
    return OutputError(
        f"cannot write {path}: {reason}{free}; nothing was changed there, "
        "make room or choose another --out"
    )


def _free_space(path: Path) -> str:
    for folder in path.parents:
        if folder.exists():
            return f" ({format_bytes(shutil.disk_usage(folder).free)} free)"
    return ""


def _flush(path: Path) -> None:
    """Push ``path`` to the disk, so that the rename never outlives the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step where the system can (renameat2), else in two renames."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(new), os.fsencode(old)
    if renameat2 and not renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        return
    aside = new.with_name(new.name + ".old")
    old.rename(aside)
    new.rename(old)
