"""Every tensor of an artifact as the numbers that its codes stand for, some rows at a time.

Nothing here is shared with what wrote the artifact, nor with the codec of training: GGUF goes
through the ``gguf`` package, ONNX through the ``onnx`` package and the definition of its operators.
A checkpoint is not needed, nor torch.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from edgekd.errors import VerificationError
from edgekd.export.architectures import architecture_of_gguf, deinterleave_rows
from edgekd.export.onnx_graph import ROWS_KEY
from edgekd.runtime.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from edgekd.runtime.model_kind import ModelKind, detect_kind
from edgekd.runtime.static_model import HOST_GRAPH, is_static, read_static

# N rows, B blocks in a row

_CHUNK_VALUES = 1 << 20
_WHOLE_GRAPH = "model.onnx"
_BLOCK_SIZE = 32


@dataclass(frozen=True)
class Values:
    """One tensor, by its name in the checkpoint and with its rows in the checkpoint's order."""

    name: str
    floats: np.dtype[Any]
    """What its numbers were rounded to; of a matrix in blocks float32."""
    chunks: Iterator[NDArray[np.float32]]
    """The values, to be read once, before the next tensor is asked for."""


def read_values(artifact: Path) -> Iterator[Values]:
    """Yield the tensors of the GGUF file or ONNX folder ``artifact``.

    Graphs of one folder that refer to the same bytes yield them once. What follows from the config,
    such as rotary tables, is left out.

    Raises:
        VerificationError: it is of an architecture that edgekd does not export.
        ModelError: the header of the GGUF file is malformed.
    """
    if detect_kind(artifact) is ModelKind.GGUF:
        yield from _gguf_values(artifact)
        return
    names = [_WHOLE_GRAPH]
    if is_static(artifact):
        names = [*(f"{part}.onnx" for part in read_static(artifact).all_parts()), HOST_GRAPH]
    seen: set[tuple[str, ...]] = set()
    for name in names:
        yield from _Graph(artifact / name, seen).values()


def _gguf_values(path: Path) -> Iterator[Values]:
    header = read_gguf_header(path)
    architecture = architecture_of_gguf(str(header.metadata.get("general.architecture")))
    if architecture is None:
        raise VerificationError(f"{path} is of no architecture that edgekd exports")
    n_heads, n_groups = _head_counts(header, architecture.gguf)
    for entry in header.tensors:
        if (name := architecture.to_hf_name(entry.name)) is None:
            continue
        stored = np.fromfile(path, np.uint8, entry.size_bytes, offset=entry.offset_bytes)
        rows: NDArray[Any] = stored.reshape(entry.shape[1] if len(entry.shape) > 1 else 1, -1)
        if n_rotated := architecture.rotated_heads(name, n_heads, n_groups):
            rows = deinterleave_rows(rows.reshape(-1, _row_bytes(entry)), n_rotated)
        floats = {"F16": np.float16, "F32": np.float32}.get(entry.type_name, np.float32)
        yield Values(name, np.dtype(floats), _dequantized(rows, entry))


def _row_bytes(entry: GgufTensor) -> int:
    """Return the bytes of a row; a bias has one value in each of its rows."""
    n_rows = entry.shape[1] if len(entry.shape) > 1 else entry.shape[0]
    return entry.size_bytes // n_rows


def _head_counts(header: GgufHeader, prefix: str) -> tuple[int, int]:
    n_heads = int(header.metadata[f"{prefix}.attention.head_count"])
    return n_heads, int(header.metadata.get(f"{prefix}.attention.head_count_kv", n_heads))


def _dequantized(rows: NDArray[np.uint8], entry: GgufTensor) -> Iterator[NDArray[np.float32]]:
    kind, step = GGMLQuantizationType[entry.type_name], max(1, _CHUNK_VALUES // entry.shape[0])
    for start in range(0, len(rows), step):
        with np.errstate(invalid="ignore"):  # a scale may be infinite: whoever reads looks
            values = dequantize(rows[start : start + step], kind)
        yield values.astype(np.float32, copy=False)


class _Graph:
    """The initializers of one model file."""

    def __init__(self, path: Path, seen: set[tuple[str, ...]]) -> None:
        """Read the graph at ``path``, without the weights beside it; ``seen`` are left out."""
        model = onnx.load(str(path), load_external_data=False)
        self._folder = path.parent
        self._seen = seen
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        self._rows: dict[str, dict[str, int]] = json.loads(metadata.get(ROWS_KEY, "{}"))

    def values(self) -> Iterator[Values]:
        for name, tensor in self._stored.items():
            stem, _, end = name.rpartition(".")
            is_matrix = end == "codes" and f"{stem}.scales" in self._stored
            if (is_matrix or end in ("weight", "bias")) and self._is_new(tensor):
                yield from self._blocks(stem) if is_matrix else self._floats(name)

    def _is_new(self, tensor: TensorProto) -> bool:
        place = (tensor.name, *(f"{entry.key} {entry.value}" for entry in tensor.external_data))
        is_new = place not in self._seen
        self._seen.add(place)
        return is_new

    def _array(self, name: str) -> NDArray[Any]:
        tensor = TensorProto()  # a copy, which lets go of what it loads
        tensor.CopyFrom(self._stored[name])
        array: NDArray[Any] = numpy_helper.to_array(tensor, str(self._folder))
        return array

    def _floats(self, name: str) -> Iterator[Values]:
        array = self._array(name)
        for part, rows in self._parts(name, len(array)):
            yield Values(part, array.dtype, iter([array[rows].astype(np.float32, copy=False)]))

    def _blocks(self, name: str) -> Iterator[Values]:
        """Yield the matrix in blocks ``name``: (code - zero point) * scale, as MatMulNBits does."""
        codes_NBK, scales_NB = self._array(f"{name}.codes"), self._array(f"{name}.scales")
        points_NB = self._points(name, codes_NBK)
        for part, rows in self._parts(name, len(codes_NBK)):
            chunks = _block_values(codes_NBK[rows], scales_NB[rows], points_NB[rows])
            yield Values(part, np.dtype(np.float32), chunks)

    def _points(self, name: str, codes_NBK: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the code that stands for zero in each block: stored, or the middle of the range.

        Two share a byte, the last one of an odd number of blocks has none to share with.
        """
        n_blocks = codes_NBK.shape[1]
        if f"{name}.zero_points" not in self._stored:
            middle = 128 if codes_NBK.shape[2] == _BLOCK_SIZE else 8
            return np.broadcast_to(np.uint8(middle), codes_NBK.shape[:2])
        return _nibbles(self._array(f"{name}.zero_points"))[:, :n_blocks]

    def _parts(self, stored: str, n_rows: int) -> Iterator[tuple[str, slice]]:
        """Yield names and rows of what lies in one matrix, or in one bias."""
        stem, _, end = stored.rpartition(".")
        parts = self._rows.get(f"{stem}.weight", {f"{stem}.weight": n_rows})
        if sum(parts.values()) != n_rows:
            raise VerificationError(f"{stored} has {n_rows} rows, said are {parts}; export again")
        start = 0
        for name, length in parts.items():
            yield f"{name.removesuffix('weight')}{end}", slice(start, start + length)
            start += length


def _block_values(
    codes_NBK: NDArray[np.uint8], scales_NB: NDArray[Any], points_NB: NDArray[np.uint8]
) -> Iterator[NDArray[np.float32]]:
    n_rows, n_blocks = scales_NB.shape
    step = max(1, _CHUNK_VALUES // (n_blocks * _BLOCK_SIZE))
    for start in range(0, n_rows, step):
        part = slice(start, start + step)
        codes = codes_NBK[part]
        if codes.shape[2] != _BLOCK_SIZE:
            codes = _nibbles(codes)
        signed = codes.astype(np.float32) - points_NB[part, :, None]
        with np.errstate(invalid="ignore"):
            values = signed * scales_NB[part, :, None].astype(np.float32)
        yield values.reshape(len(codes), -1)


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return two values for each byte along the last axis, low nibbles first."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
