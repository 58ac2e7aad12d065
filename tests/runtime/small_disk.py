"""A disk with little room, for what happens when it fills: a tmpfs, which only root can mount."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[None]:
    """Let ``folder`` have room for ``n_bytes`` only."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={n_bytes}", "edgekd-test", str(folder)]
    subprocess.run(["mount", *options], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@cache
def why_no_small_disk() -> str | None:
    """Return why no disk can be mounted here."""
    if os.geteuid() != 0:
        return "a small disk needs root, who may mount one"
    try:
        with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder), 1 << 16):
            return None
    except (OSError, subprocess.CalledProcessError):
        return "this container may not mount a small disk (CAP_SYS_ADMIN)"
