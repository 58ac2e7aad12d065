"""Matrices rounded beforehand, on data or in training, as GGUF rows in a folder, a file each.

Calibration rounds with the data at hand and only once; both writers and the checks then take the
very same blocks. They are kept in files so that memory does not hold the model.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import VerificationError


@dataclass(frozen=True)
class KeptRows:
    """Matrices that were rounded beforehand, in the checkpoint's order of rows."""

    folder: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    """How they were rounded, for the manifest."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Checkpoint tensor name to the hash of its rows: one and the same in every container."""

    def keep(self, name: str, rows: NDArray[np.uint8]) -> None:
        """Keep ``rows`` [N, bytes] as those of the matrix ``name``."""
        np.save(self.folder / f"{name}.npy", rows)
        self.sha256[name] = hash_rows(rows)

    def rows(self, name: str) -> NDArray[np.uint8] | None:
        """Return the rows [N, bytes] of the matrix ``name``; none if it was not kept."""
        if name not in self.sha256:
            return None
        rows: NDArray[np.uint8] = np.load(self.folder / f"{name}.npy")
        return rows

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of them; enough to check an artifact later."""
        return {**self.recipe, "rows_sha256": dict(self.sha256)}


def keep_as_recorded(
    folder: Path, recorded: dict[str, Any], found: Iterable[tuple[str, NDArray[np.uint8]]]
) -> KeptRows:
    """Return the rows ``found`` in an artifact, once they are those that its manifest recorded.

    Raises:
        VerificationError: one is missing or has another hash.
    """
    expected, kept = recorded["rows_sha256"], KeptRows(folder)
    for name, rows in found:
        if name in expected:
            kept.keep(name, rows)
    if different := [name for name in expected if kept.sha256.get(name) != expected[name]]:
        raise VerificationError(
            f"matrix {different[0]} is not the one that the manifest recorded "
            f"({len(different)} of {len(expected)} differ)"
        )
    return kept


def hash_rows(rows: NDArray[np.uint8]) -> str:
    """Return the sha256 of ``rows``."""
    return hashlib.sha256(rows.tobytes()).hexdigest()
