"""One stored tensor of an ONNX file, and whether its values are as long as type and shape say.

Field numbers and storage: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice

from edgekd.runtime.protobuf_wire import BYTES, FIXED32, FIXED64, VARINT, Wire

_FLOATS, _INT32S, _STRINGS, _INT64S, _DOUBLES, _UINT64S = 4, 5, 6, 7, 10, 11
_DIMS, _DATA_TYPE, _SEGMENT, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 3, 8, 9, 13, 14
_FORMS = {
    **{_DIMS: {VARINT, BYTES}, _DATA_TYPE: {VARINT}, _NAME: {BYTES}, _RAW: {BYTES}},
    **{_STRINGS: {BYTES}, _EXTERNAL: {BYTES}, _LOCATION: {VARINT}},
}
"""Field to its wire types; parsers pass over it in any other."""
_ONCE = {_DATA_TYPE, _NAME, _RAW, _LOCATION}
# Field with values of its own type -> wire type of one, bytes of one where that is fixed.
_TYPED = {
    _FLOATS: (FIXED32, 4),
    _INT32S: (VARINT, 0),
    _INT64S: (VARINT, 0),
    _DOUBLES: (FIXED64, 8),
    _UINT64S: (VARINT, 0),
}
_MAX_DIMS = 64  # real ones have at most 5
_MAX_BYTES = 2**63
_STRING = 8
_SHOWN = 100  # characters of a name in an error

# TensorProto.DataType -> (name, bits of a value, field for it where it is not raw).
ELEMENT_TYPES: dict[int, tuple[str, int, int]] = {
    1: ("FLOAT", 32, _FLOATS),
    2: ("UINT8", 8, _INT32S),
    3: ("INT8", 8, _INT32S),
    4: ("UINT16", 16, _INT32S),
    5: ("INT16", 16, _INT32S),
    6: ("INT32", 32, _INT32S),
    7: ("INT64", 64, _INT64S),
    _STRING: ("STRING", 8, _STRINGS),
    9: ("BOOL", 8, _INT32S),
    10: ("FLOAT16", 16, _INT32S),
    11: ("DOUBLE", 64, _DOUBLES),
    12: ("UINT32", 32, _UINT64S),
    13: ("UINT64", 64, _UINT64S),
    14: ("COMPLEX64", 64, _FLOATS),
    15: ("COMPLEX128", 128, _DOUBLES),
    16: ("BFLOAT16", 16, _INT32S),
    17: ("FLOAT8E4M3FN", 8, _INT32S),
    18: ("FLOAT8E4M3FNUZ", 8, _INT32S),
    19: ("FLOAT8E5M2", 8, _INT32S),
    20: ("FLOAT8E5M2FNUZ", 8, _INT32S),
    21: ("UINT4", 4, _INT32S),
    22: ("INT4", 4, _INT32S),
    23: ("FLOAT4E2M1", 4, _INT32S),
    24: ("FLOAT8E8M0", 8, _INT32S),
    25: ("UINT2", 2, _INT32S),
    26: ("INT2", 2, _INT32S),
    27: ("FLOAT6E2M3", 6, _INT32S),
    28: ("FLOAT6E3M2", 6, _INT32S),
}
_COMPLEX = (14, 15)  # two entries each
_SHARED_ENTRY = (2, 4)  # bits of which a byte's worth lies in one entry


@dataclass
class StoredTensor:
    """A ``TensorProto`` as it is written."""

    name: str = ""
    shape: list[int] = field(default_factory=list)
    data_type: int = 0
    raw_bytes: int | None = None
    """None where there is no such field, which is not the same as an empty one."""
    entries: Counter[int] = field(default_factory=Counter)
    """Field with values to how many it holds."""
    is_external: bool = False
    external: list[tuple[str, str]] = field(default_factory=list)
    """Keys and values that say where the values lie outside."""

    @property
    def shown(self) -> str:
        """The name as errors give it."""
        return f"tensor {self.name[:_SHOWN]!r}"

    @property
    def n_values(self) -> int:
        """Values that the shape has room for."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the values where they are raw."""
        return -(-self.n_values * ELEMENT_TYPES[self.data_type][1] // 8)


def read_tensor(wire: Wire, start: int, end: int) -> StoredTensor:
    """Return the ``TensorProto`` from ``start`` to ``end``; its values are not read.

    Raises:
        ValueError: it is malformed, or gives something twice of which parsers take either.
    """
    tensor, given = StoredTensor(), set()
    for number, kind, place, stop in wire.fields(start, end):
        is_again = number in given and number in _ONCE
        if is_again or (number in _FORMS and kind not in _FORMS[number]):
            raise ValueError(f"{tensor.shown} has its field {number} twice or in a wrong form")
        given.add(number)
        if number == _DIMS:
            sizes = [place] if kind == VARINT else wire.numbers(place, stop)
            tensor.shape += islice(sizes, 1 + _MAX_DIMS)
            if len(tensor.shape) > _MAX_DIMS:
                raise ValueError(f"{tensor.shown} has more than {_MAX_DIMS} dimensions")
        elif number == _DATA_TYPE:
            tensor.data_type = place
        elif number == _NAME:
            tensor.name = wire.text(place, stop)
        elif number == _RAW:
            tensor.raw_bytes = stop - place
        elif number == _EXTERNAL:
            tensor.external.append(_pair(wire, place, stop))
        elif number == _LOCATION:
            if place > 1:
                raise ValueError(f"{tensor.shown} has the unknown data location {place}")
            tensor.is_external = bool(place)
        elif number == _STRINGS:
            tensor.entries[number] += 1
        elif number in _TYPED:
            tensor.entries[number] += _count(wire, number, kind, place, stop)
        elif number == _SEGMENT:
            raise ValueError(f"{tensor.shown} is stored in segments, which nothing reads")
    return tensor


def check_values(tensor: StoredTensor) -> None:
    """Return only if ``tensor`` has the values that its type and shape ask for.

    Those outside are the caller's to look at; then there may be none here.

    Raises:
        ValueError: it has others, or its type or shape are none.
    """
    _check_shape(tensor)
    name, bits, number = ELEMENT_TYPES[tensor.data_type]
    kinds = len([count for count in tensor.entries.values() if count])
    if tensor.is_external:
        if tensor.raw_bytes or kinds:
            raise ValueError(f"{tensor.shown} has values both in the model and in another file")
        if tensor.data_type == _STRING:
            raise ValueError(f"{tensor.shown} has strings in another file; they must lie inside")
        return
    if tensor.external:
        raise ValueError(f"{tensor.shown} names another file, though its values lie in the model")
    shape = " x ".join(map(str, tensor.shape)) or "one"
    if tensor.raw_bytes is not None:
        if tensor.data_type == _STRING or kinds:
            raise ValueError(f"{tensor.shown} has raw values beside or instead of typed ones")
        if tensor.raw_bytes != tensor.size_bytes:
            raise ValueError(
                f"{tensor.shown} has {tensor.raw_bytes} bytes of values; "
                f"{shape} {name} are {tensor.size_bytes}"
            )
        return
    expected = _n_entries(tensor, bits)
    if tensor.entries[number] != expected or kinds > bool(expected):
        raise ValueError(
            f"{tensor.shown} has {sum(tensor.entries.values())} values; {shape} {name} are "
            f"{expected} of field {number}"
        )


def _check_shape(tensor: StoredTensor) -> None:
    if tensor.data_type not in ELEMENT_TYPES:
        raise ValueError(f"{tensor.shown} is of the unknown element type {tensor.data_type}")
    # Negative ones are the largest numbers here. Without the zeros: native code multiplies in turn.
    largest = math.prod(size for size in tensor.shape if size)
    if largest * ELEMENT_TYPES[tensor.data_type][1] // 8 >= _MAX_BYTES:
        raise ValueError(f"{tensor.shown} has dimensions that are negative or too large to count")


def _n_entries(tensor: StoredTensor, bits: int) -> int:
    if bits in _SHARED_ENTRY:
        return tensor.size_bytes
    return tensor.n_values * (2 if tensor.data_type in _COMPLEX else 1)


def _count(wire: Wire, number: int, kind: int, start: int, end: int) -> int:
    """Return how many values of a typed field lie from ``start`` to ``end``."""
    one, size_bytes = _TYPED[number]
    if kind == one:
        return 1
    if kind != BYTES or (size_bytes and (end - start) % size_bytes):
        raise ValueError(f"values of field {number} at byte {end} are cut off or in a wrong form")
    return (end - start) // size_bytes if size_bytes else wire.count_numbers(start, end)


def _pair(wire: Wire, start: int, end: int) -> tuple[str, str]:
    """Return key and value of a ``StringStringEntryProto``."""
    found: dict[int, str] = {}
    for number, kind, place, stop in wire.fields(start, end):
        if number in (1, 2):
            if kind != BYTES or number in found:
                raise ValueError(f"a key or value at byte {stop} is given twice or no text")
            found[number] = wire.text(place, stop)
    return found.get(1, ""), found.get(2, "")
