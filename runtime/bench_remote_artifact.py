"""A model or a pack on its way to another machine: known by its content, whatever its name."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from edgekd.errors import DataError
from edgekd.files import sha256_of, size_of
from edgekd.runtime.model_kind import ModelKind, locate_model
from edgekd.runtime.page_cache import model_files

_UNSAFE = re.compile(r"[^A-Za-z0-9._]+")  # what a shell or scp there may read in its own way


@dataclass(frozen=True)
class Artifact:
    """A model or a reference pack on this machine."""

    path: Path
    kind: ModelKind | None
    """None of a reference pack, which needs no engine."""
    n_bytes: int
    hashes: dict[str, str]
    """Sha256 of each file by its path below ``path``; of a single file by the name it gets."""

    @property
    def name(self) -> str:
        """Return the name that it gets there."""
        return _UNSAFE.sub("_", self.path.absolute().name).lstrip(".") or "model"

    @property
    def sha256(self) -> str:
        """Return the file's own hash, or one over the names and hashes of a folder."""
        if self.path.is_file():
            return next(iter(self.hashes.values()))
        return hashlib.sha256(json.dumps(self.hashes, sort_keys=True).encode()).hexdigest()

    @property
    def extra(self) -> str:
        """Return the extra of edgekd that runs it."""
        return "torch" if self.kind is ModelKind.CHECKPOINT else str(self.kind)


def read_artifact(model: str) -> Artifact:
    """Return what is to be copied of ``model``.

    Raises:
        ModelError: nothing is there, or it is no model.
    """
    kind, path = locate_model(model)
    hashes = {
        file.relative_to(path).as_posix() if path.is_dir() else path.name: sha256_of(file)
        for file in model_files(path)
    }
    return Artifact(path, kind, size_of(path), hashes)


def read_pack_artifact(file: Path) -> Artifact:
    """Return what is to be copied of a reference pack; the other machine reads and checks it.

    Raises:
        DataError: nothing is there.
    """
    if not file.is_file():
        raise DataError(f"no reference pack at {file}; make one with edgekd eval --write-reference")
    return Artifact(file, None, size_of(file), {file.name: sha256_of(file)})
