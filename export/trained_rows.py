"""Blocks that a student was trained with, kept beside its weights: exported as they are.

Learned scales cannot be derived from the weights, so training writes the blocks themselves, as GGUF
rows, with the hash of the weights that they belong to.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import ModelError
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.grid_rows import BLOCK_BYTES, BLOCK_SIZE
from edgekd.export.kept_rows import KeptRows
from edgekd.export.plan import Plan
from edgekd.files import sha256_of_all

FILE = "grid.npz"
_WEIGHTS_KEY = "weights_sha256"


def write_trained_rows(folder: Path, rows: Mapping[str, NDArray[np.uint8]]) -> None:
    """Write the Q4_0 ``rows`` of each matrix beside the safetensors files in ``folder``."""
    weights_sha256 = sha256_of_all(sorted(folder.glob("*.safetensors")))
    arrays: dict[str, NDArray[Any]] = {_WEIGHTS_KEY: np.array(weights_sha256), **rows}
    np.savez(folder / FILE, **arrays)  # type: ignore[arg-type]


def with_trained_rows(checkpoint: Checkpoint, plan: Plan, folder: Path) -> Plan:
    """Return ``plan`` with the blocks that ``checkpoint`` was trained with, kept in ``folder``.

    Without such blocks, or where the plan has no Q4_0 matrix among them, it is returned as it is.

    Raises:
        ModelError: the blocks are damaged, or of other weights.
    """
    path = checkpoint.folder / FILE
    if not path.is_file():
        return plan
    kept = KeptRows(folder, {"method": "trained scales"})
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            if str(arrays[_WEIGHTS_KEY]) != checkpoint.weights_sha256():
                raise ModelError(
                    f"{path} belongs to other weights than those beside it; remove it to round "
                    "them anew"
                )
            for name in arrays.files:
                if name in plan.types and plan.grid_of(name) == "q4_0":
                    kept.keep(name, _checked(arrays[name], name, checkpoint))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} is damaged: {error}; fetch or train it again") from error
    return replace(plan, kept=kept) if kept.sha256 else plan


def _checked(rows: NDArray[np.uint8], name: str, checkpoint: Checkpoint) -> NDArray[np.uint8]:
    n_rows, n_columns = checkpoint.shape(name)
    shape = (n_rows, n_columns // BLOCK_SIZE * BLOCK_BYTES["q4_0"])
    if rows.shape != shape or rows.dtype != np.uint8:
        raise ValueError(f"{name} has {rows.dtype} rows of shape {rows.shape}, not uint8 {shape}")
    return rows
