"""The header of a GGUF file, read without trusting it.

Every count, length and offset is checked against the size of the file before it is used, so a
truncated or hostile file gives one clear error here instead of reaching a native parser.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgekd.errors import ModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT_BYTES = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MIN_KV_BYTES = 8 + 4 + 1  # empty key, type, one-byte value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # empty name, n_dims, one dim, type, offset
_MAX_ARRAY_DEPTH = 4

# gguf_metadata_value_type -> struct format of the fixed-size ones.
_SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9

# ggml_type -> (name, values per block, bytes per block), from ggml.h and ggml-common.h.
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies in the file."""

    name: str
    shape: tuple[int, ...]
    """Innermost dimension first, as the file stores it."""
    type_name: str
    offset_bytes: int
    """From the start of the file."""
    size_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Everything in front of the weights."""

    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


def is_gguf(path: Path) -> bool:
    """Return whether the file at ``path`` starts like a GGUF file."""
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def read_gguf_header(path: Path) -> GgufHeader:
    """Return metadata and tensor table of the GGUF file at ``path``.

    Raises:
        ModelError: the file is no GGUF file, is cut short, or contradicts itself.
    """
    with open(path, "rb") as file:
        return _Reader(path, file).header()


class _Reader:
    """A cursor over the header that never reads past the end of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size_bytes = path.stat().st_size

    def header(self) -> GgufHeader:
        if (magic := self._bytes(4, "magic")) != MAGIC:
            raise self._fault(f"starts with {magic!r}, not with {MAGIC!r}: it is no GGUF file")
        if (version := self._number("<I")) not in _VERSIONS:
            raise self._fault(f"has GGUF version {version}; versions 2 and 3 can be read")
        n_tensors = self._count("tensors", _MIN_TENSOR_BYTES)
        n_entries = self._count("metadata entries", _MIN_KV_BYTES)
        entries = [self._entry() for _ in range(n_entries)]
        self._check_unique("the metadata key", [key for key, _ in entries])
        rows = [self._tensor_row() for _ in range(n_tensors)]
        self._check_unique("a tensor", [row[0] for row in rows])
        metadata = dict(entries)
        return GgufHeader(metadata, self._place(rows, self._alignment(metadata)))

    def _entry(self) -> tuple[str, Any]:
        return self._string(), self._value(self._number("<I"))

    def _value(self, value_type: int, depth: int = 0) -> Any:
        if value_type in _SCALARS:
            return self._number(_SCALARS[value_type])
        if value_type == _STRING:
            return self._string()
        if value_type == _ARRAY and depth < _MAX_ARRAY_DEPTH:
            return self._array(depth)
        raise self._fault(f"has a metadata value of unknown type {value_type}")

    def _array(self, depth: int) -> list[Any]:
        item_type = self._number("<I")
        if item_type in _SCALARS:
            item_bytes = struct.calcsize(_SCALARS[item_type])
            length = self._count("array items", item_bytes)
            packed = self._bytes(length * item_bytes, "array")
            return [item[0] for item in struct.iter_unpack(_SCALARS[item_type], packed)]
        return [self._value(item_type, depth + 1) for _ in range(self._count("array items", 8))]

    def _tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        n_dims = self._number("<I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self._fault(f"gives tensor {name!r} {n_dims} dimensions; 1 to 4 are allowed")
        shape = tuple(self._number("<Q") for _ in range(n_dims))
        return name, shape, self._number("<I"), self._number("<Q")

    def _place(
        self, rows: list[tuple[str, tuple[int, ...], int, int]], alignment_bytes: int
    ) -> tuple[GgufTensor, ...]:
        tensors = []
        start_bytes = -(-self._file.tell() // alignment_bytes) * alignment_bytes
        for name, shape, type_id, offset in rows:
            type_name, size_bytes = self._tensor_size(name, shape, type_id)
            if offset % alignment_bytes:
                raise self._fault(
                    f"puts tensor {name!r} at offset {offset}, which is no multiple of the "
                    f"alignment {alignment_bytes}; convert the model again"
                )
            place = start_bytes + offset
            if place + size_bytes > self._size_bytes:
                raise self._fault(
                    f"is cut short: tensor {name!r} ends at byte {place + size_bytes}, "
                    f"the file at {self._size_bytes}; fetch it again"
                )
            tensors.append(GgufTensor(name, shape, type_name, place, size_bytes))
        self._check_overlap(tensors)
        return tuple(tensors)

    def _tensor_size(self, name: str, shape: tuple[int, ...], type_id: int) -> tuple[str, int]:
        if type_id not in GGML_TYPES:
            raise self._fault(f"stores tensor {name!r} in unknown ggml type {type_id}")
        type_name, block_size, block_bytes = GGML_TYPES[type_id]
        if not all(shape) or shape[0] % block_size:
            raise self._fault(
                f"gives tensor {name!r} the shape {shape}; rows of {type_name} must be a "
                f"multiple of {block_size}"
            )
        return type_name, math.prod(shape) // block_size * block_bytes

    def _check_overlap(self, tensors: list[GgufTensor]) -> None:
        ordered = sorted(tensors, key=lambda tensor: tensor.offset_bytes)
        for one, next_one in zip(ordered, ordered[1:], strict=False):
            if one.offset_bytes + one.size_bytes > next_one.offset_bytes:
                raise self._fault(f"has overlapping tensors {one.name!r} and {next_one.name!r}")

    def _check_unique(self, what: str, names: list[str]) -> None:
        """Readers differ in which of two they take, so that none would be checked for all."""
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise self._fault(f"has {what} {name!r} twice; convert the model again")
            seen.add(name)

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT_BYTES)
        is_number = isinstance(alignment, int) and not isinstance(alignment, bool)
        if not is_number or alignment <= 0 or alignment & (alignment - 1):
            raise self._fault(f"has the alignment {alignment!r}; a power of two is needed")
        return int(alignment)

    def _string(self) -> str:
        return self._bytes(self._number("<Q"), "string").decode("utf-8", "replace")

    def _count(self, what: str, least_bytes: int) -> int:
        """Return a count that the rest of the file can hold at ``least_bytes`` each."""
        count = int(self._number("<Q"))
        if count * least_bytes > self._rest():
            raise self._fault(f"claims {count} {what}, more than its {self._size_bytes} bytes hold")
        return count

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout), "number"))[0]

    def _bytes(self, length: int, what: str) -> bytes:
        if length > self._rest():
            raise self._fault(
                f"is cut short at byte {self._file.tell()} of {self._size_bytes}: "
                f"a {what} of {length} bytes does not fit; fetch it again"
            )
        return self._file.read(length)

    def _rest(self) -> int:
        return self._size_bytes - self._file.tell()

    def _fault(self, what: str) -> ModelError:
        return ModelError(f"{self._path} {what}")
