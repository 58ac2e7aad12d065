"""The sha256 of every dequantized tensor: one and the same in every container of a student.

What is hashed are the float32 values, row by row in the checkpoint's order, little endian, and
-0 as 0, since a negative scale times code 0 says nothing. Norms are hashed as runtimes multiply
by them, Gemma's offset included.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import VerificationError
from edgekd.export.read_values import Values, read_values
from edgekd.runtime.static_model import is_static
from edgekd.units import format_some
from edgekd.untrusted import untrusted

if TYPE_CHECKING:
    import torch

    from edgekd.export.checkpoint import Checkpoint
    from edgekd.export.plan import Plan

Hashes = dict[str, str]
"""Checkpoint tensor name to hexadecimal sha256."""


def hash_tensors(artifact: Path) -> Hashes:
    """Return the hash of every tensor in ``artifact``, a GGUF file or an ONNX folder.

    Raises:
        VerificationError: its graphs hold different tensors of one name.
        ModelError: it is malformed.
    """
    hashes: Hashes = {}
    with untrusted(artifact):
        for values in read_values(artifact):
            digest = hashlib.sha256()
            for chunk in values.chunks:
                digest.update(_canonical(chunk))
            _add(hashes, values.name, digest.hexdigest(), artifact)
    return hashes


def check_recorded(artifact: Path, found: Hashes, recorded: Hashes) -> None:
    """Compare the hashes ``found`` in ``artifact`` with those that its manifest ``recorded``.

    Raises:
        VerificationError: a tensor is missing, new, or another one.
    """
    if faulty := [name for name in recorded | found if found.get(name) != recorded.get(name)]:
        raise VerificationError(
            f"{artifact.name}: {format_some(faulty)} are not the tensors that its manifest "
            "recorded; export the model again"
        )


def hash_and_compare(
    artifact: Path,
    checkpoint: "Checkpoint",
    plan: "Plan",
    weights: Mapping[str, "torch.Tensor"],
) -> Hashes:
    """Return the hash of every tensor in ``artifact``, once it equals that of ``weights``.

    ``weights`` are the checkpoint's, rounded as ``plan`` says.

    Raises:
        VerificationError: a tensor differs, is missing or is no number.
    """
    hashes: Hashes = {}
    faulty, architecture = [], checkpoint.architecture
    for values in read_values(artifact):
        if values.name not in plan.types:
            raise VerificationError(f"{artifact.name} holds {values.name}, the checkpoint does not")
        expected = weights[values.name].detach().numpy()
        offset = architecture.norm_offset
        if offset and architecture.is_norm(values.name):
            expected = expected + np.float32(offset)
        compared = _Compared(values, expected)
        _add(hashes, values.name, compared.sha256, artifact)
        if not compared.is_finite:
            raise VerificationError(
                f"{artifact.name}: {values.name} has weights beyond what "
                f"{plan.types[values.name]} holds; export as f32"
            )
        if not compared.is_equal:
            faulty.append(values.name)
    # Graphs whose activations are whole numbers hold norms and biases as such.
    needed = plan.grids() if is_static(artifact) else plan.types
    if faulty or (faulty := [name for name in needed if name not in hashes]):
        raise VerificationError(
            f"{artifact.name}: {format_some(faulty)} are missing or not the checkpoint's, rounded"
        )
    return hashes


class _Compared:
    """A tensor of an artifact beside what it should be, in one pass."""

    def __init__(self, values: Values, expected: NDArray[np.float32]) -> None:
        flat = expected.reshape(-1)
        self.is_equal = self.is_finite = True
        digest, start = hashlib.sha256(), 0
        for chunk in values.chunks:
            wanted = flat[start : start + chunk.size].astype(values.floats, copy=False)
            self.is_equal &= np.array_equal(chunk.reshape(-1), wanted)
            self.is_finite &= bool(np.isfinite(chunk).all())
            digest.update(_canonical(chunk))
            start += chunk.size
        self.is_equal &= start == flat.size
        self.sha256 = digest.hexdigest()


def _canonical(values: NDArray[np.float32]) -> memoryview:
    """Return ``values`` as they are hashed."""
    return np.ascontiguousarray(values + np.float32(0), "<f4").data


def _add(hashes: Hashes, name: str, sha256: str, artifact: Path) -> None:
    if hashes.setdefault(name, sha256) != sha256:
        raise VerificationError(f"{artifact.name}: its graphs hold different {name}")
