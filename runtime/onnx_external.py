"""The files beside an ONNX model that it reads: they lie in its folder, and hold what it takes.

Nothing of them is read here.
"""

import os
import stat
from collections import defaultdict
from pathlib import Path, PurePosixPath, PureWindowsPath

from edgekd.runtime.onnx_tensor import StoredTensor

_KEYS = ("location", "offset", "length", "checksum")
"""Weights that were packed for a processor ("prepacked_...") are not among them: no size of theirs
follows from the model."""
_MAX_DIGITS = 18
_SHOWN = 100


class ExternalFiles:
    """The bytes of other files that the tensors of one model are stored in."""

    def __init__(self, model: Path) -> None:
        """Look beside the file ``model``."""
        self._model = model
        self._sizes: dict[str, tuple[Path, int]] = {}
        self._taken: dict[Path, dict[tuple[int, int], str]] = defaultdict(dict)

    def take(self, tensor: StoredTensor) -> None:
        """Note where ``tensor`` lies.

        Raises:
            ValueError: that is not in the folder, or beyond the end of the file.
        """
        named = _named(tensor)
        size_bytes = tensor.size_bytes
        offset = _whole_number(tensor, named.get("offset", "0"))
        length = _whole_number(tensor, named.get("length", str(size_bytes)))
        if length != size_bytes:
            raise ValueError(
                f"{tensor.shown} takes {length} bytes of another file; "
                f"its type and shape are {size_bytes}"
            )
        file, file_bytes = self._file(tensor.shown, named["location"])
        if offset + length > file_bytes:
            raise ValueError(
                f"{tensor.shown} ends at byte {offset + length} of {file.name}, "
                f"which has {file_bytes}"
            )
        if length:
            self._taken[file].setdefault((offset, offset + length), tensor.shown)

    def open_beside(self, what: str, location: str) -> None:
        """Return only if ``location`` is a file in the folder.

        Raises:
            ValueError: it is none.
        """
        self._file(what, location)

    def check_overlaps(self) -> None:
        """Return only if no two tensors share a part of their bytes; all of them they may share.

        Raises:
            ValueError: two do.
        """
        for file, ranges in self._taken.items():
            ordered = sorted(ranges)
            for one, other in zip(ordered, ordered[1:], strict=False):
                if one[1] > other[0]:
                    raise ValueError(f"{ranges[one]} and {ranges[other]} overlap in {file.name}")

    def _file(self, what: str, location: str) -> tuple[Path, int]:
        if location not in self._sizes:
            self._sizes[location] = _find_inside(self._model, what, location)
        return self._sizes[location]


def _find_inside(model: Path, what: str, location: str) -> tuple[Path, int]:
    """Return where the file ``location`` of ``model`` really lies, and its bytes."""
    shown = f"{what} lies in {location[:_SHOWN]!r}"
    if not _is_plain(location):
        raise ValueError(f"{shown}; allowed is the relative path of a file in the model's folder")
    try:
        file = Path(os.path.realpath(model.parent / location))
        # Hubs keep a folder of links to files that all lie in another; ONNX Runtime allows both.
        homes = (os.path.realpath(model.parent), Path(os.path.realpath(model)).parent)
        if not any(file.is_relative_to(home) for home in homes):
            raise ValueError(f"{shown}, a link that leads out of the model's folder")
        found = file.stat()
    except OSError as error:
        raise ValueError(f"{shown}, which cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{shown}, which is no plain file")
    return file, found.st_size


def _is_plain(location: str) -> bool:
    """Return whether ``location`` is a relative path on every system that stays where it starts."""
    windows = PureWindowsPath(location)
    return (
        location not in ("", ".")
        # ONNX Runtime takes names with an asterisk for addresses in memory.
        and not set(location) & {"\0", "\\", "*"}
        and not windows.anchor
        and not PurePosixPath(location).is_absolute()
        and ".." not in windows.parts
    )


def _named(tensor: StoredTensor) -> dict[str, str]:
    named = dict(tensor.external)
    unknown = sorted(key[:_SHOWN] for key in named.keys() - set(_KEYS))
    if unknown or len(named) < len(tensor.external) or "location" not in named:
        found = ", ".join(key[:_SHOWN] for key, _ in tensor.external) or "nothing"
        raise ValueError(
            f"{tensor.shown} says {found!r} of where its values lie; needed is location, allowed "
            "are offset, length and checksum, each once"
        )
    return named


def _whole_number(tensor: StoredTensor, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise ValueError(f"{tensor.shown} has the offset or length {text[:_SHOWN]!r}; no number")
    return int(text)
