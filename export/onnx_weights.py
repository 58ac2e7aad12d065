"""The data files in which the weights of one ONNX folder lie, each of them once.

Graphs of one folder that have a weight in common refer to the same bytes.
"""

from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

_ALIGNMENT_BYTES = 4096  # so that runtimes can map weights instead of copying them


class WeightFiles:
    """Writes weights as they are added, so memory stays near the largest one."""

    def __init__(self, main: Path, apart: dict[str, Path] | None = None) -> None:
        """Open ``main`` and the files ``apart``, for weights whose names begin with the keys.

        They must end up beside the model files.
        """
        self._main = main
        self._apart = apart or {}
        paths = {main, *self._apart.values()}
        self._open: dict[Path, BinaryIO] = {path: path.open("wb") for path in paths}
        self._stored: dict[str, TensorProto] = {}

    def __enter__(self) -> Self:
        """Return the files, which are closed when the block ends."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files."""
        for file in self._open.values():
            file.close()

    def store(self, name: str, array: NDArray[Any]) -> TensorProto:
        """Return the weight ``name`` as an initializer, written when it is first seen."""
        if name not in self._stored:
            self._stored[name] = self._write(name, np.ascontiguousarray(array))
        stored = self._stored[name]
        assert tuple(stored.dims) == array.shape, f"{name} differs between graphs"
        return stored

    def flush(self) -> None:
        """Hand everything to the system, so that others can read the files."""
        for file in self._open.values():
            file.flush()

    def _write(self, name: str, array: NDArray[Any]) -> TensorProto:
        prefix = next((key for key in self._apart if name.startswith(key)), None)
        path = self._main if prefix is None else self._apart[prefix]
        file = self._open[path]
        start = -(-file.tell() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        file.write(b"\0" * (start - file.tell()))
        file.write(array.tobytes())
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", path.name), ("offset", start), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor
