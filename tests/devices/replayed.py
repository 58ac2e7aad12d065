"""Machines replayed from text files: one file holds the files and the replies of one device.

A line ``== path`` begins a file, ``$ command`` the reply of a command; what follows up to the
next such line is its text. A file whose heading ends in `` [0400]`` is readable by root only.
"""

from dataclasses import dataclass
from pathlib import Path

from edgekd.devices.host import Host, replay

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(file.stem for file in FIXTURES.glob("*.txt"))
_SECRET = " [0400]"


@dataclass(frozen=True)
class Replayed:
    """The content of one fixture."""

    files: dict[str, str]
    replies: dict[str, str]
    secret: frozenset[str]


def read_fixture(name: str) -> Replayed:
    files: dict[str, str] = {}
    replies: dict[str, str] = {}
    secret = set()
    target, key = files, ""
    for line in (FIXTURES / f"{name}.txt").read_text("utf-8").splitlines(keepends=True):
        if line.startswith(("== ", "$ ")):
            target = files if line.startswith("== ") else replies
            key = line.split(" ", 1)[1].rstrip("\n")
            if key.endswith(_SECRET):
                key = key.removesuffix(_SECRET)
                secret.add(key)
            target[key] = ""
        elif key:
            target[key] += line
    return Replayed(files, replies, frozenset(secret))


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
    return root


def replayed_host(name: str, root: Path) -> Host:
    """Return the machine ``name``, its files written below ``root``."""
    fixture = read_fixture(name)
    plant(root, fixture.files)
    return Host.at(root, replay(fixture.replies))
