"""Tensors of a safetensors file by plain reads: some rows at a time, as float32 in numpy.

A mapped file counts as this process's memory as far as it was read; a read into a buffer does not.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LENGTH = struct.Struct("<Q")  # of the header; the format's first field
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has no bfloat16
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}


@dataclass(frozen=True)
class StoredTensor:
    """Where and how a tensor lies in its file."""

    path: Path
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def is_plain(self) -> bool:
        """Whether numpy can read it."""
        return self.dtype in _DTYPES

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the rows ``start`` to ``stop`` as float32."""
        dtype, row = _DTYPES[self.dtype], math.prod(self.shape[1:])
        offset_bytes = self.offset_bytes + start * row * dtype.itemsize
        n_values = (stop - start) * row
        values = np.fromfile(self.path, dtype, n_values, offset=offset_bytes)
        shape = (stop - start, *self.shape[1:])
        if self.dtype == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        floats: NDArray[np.float32] = values.astype(np.float32, copy=False).reshape(shape)
        return floats


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return what lies in the safetensors file at ``path``, which is known to be well-formed."""
    with open(path, "rb") as file:
        (header_bytes,) = _LENGTH.unpack(file.read(_LENGTH.size))
        header = json.loads(file.read(header_bytes))
    start_bytes = _LENGTH.size + header_bytes
    return {
        name: StoredTensor(
            path, entry["dtype"], tuple(entry["shape"]), start_bytes + entry["data_offsets"][0]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }
