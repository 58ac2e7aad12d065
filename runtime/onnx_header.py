"""What an ONNX graph stores and how it uses it, read without the onnx package.

Only the fields that sizes need are walked; weights lie in another file and are not touched.
Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from edgekd.errors import ModelError
from edgekd.runtime.onnx_check import MAX_FILE_BYTES
from edgekd.runtime.onnx_tensor import ELEMENT_TYPES
from edgekd.runtime.protobuf_wire import VARINT, Wire

_GRAPH = 7  # of ModelProto
_NODE, _INITIALIZER, _INPUT = 1, 5, 11  # of GraphProto
_NODE_INPUT, _NODE_OUTPUT, _OP_TYPE, _ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_DIMS, _DATA_TYPE, _TENSOR_NAME = 1, 2, 8
_BITS = {kind: bits for kind, (_, bits, _) in ELEMENT_TYPES.items()}
_FLOATS = {1: "F32", 10: "F16", 16: "BF16", 11: "F64"}
# They read single rows of a table.
_EMBEDDING_OPS = {"Gather", "GatherBlockQuantized"}
_MATRIX_OPS = {"MatMul", "Gemm"}
_TABLE_OPS = _EMBEDDING_OPS | {"GroupQueryAttention", "RotaryEmbedding"}
# They only hand on what is stored; sessions fold them.
_PASSING_OPS = {"Reshape", "Cast", "Transpose", "Identity", "Unsqueeze", "DequantizeLinear"}
_MAX_DEPTH = 8
_MAX_DIMS = 64  # real ones have at most 5
# MatMulNBits with blocks of 32 is the same grid as GGUF's types.
_GRIDS = {4: "Q4_0", 8: "Q8_0"}
_PAST = "past_key_values."

_Field = tuple[int, int | bytes]


@dataclass(frozen=True)
class OnnxTensor:
    """One stored tensor."""

    name: str
    shape: tuple[int, ...]
    size_bytes: int
    is_looked_up: bool
    """Whether a token reads a row of it and not all."""


@dataclass(frozen=True)
class OnnxHeader:
    """The sizes in a graph."""

    tensors: tuple[OnnxTensor, ...]
    matrix_sizes: tuple[int, ...]
    """Weights of every matrix that hidden states are multiplied by."""
    has_own_embedding: bool
    """Whether a matrix serves as embedding alone."""
    format: str
    cache_value_bytes: int
    """Of one value in the KV cache."""


@dataclass(frozen=True)
class _Node:
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: dict[str, int]


def read_onnx_header(file: Path) -> OnnxHeader:
    """Return the sizes in the graph ``file``.

    Raises:
        ModelError: it is no ONNX model or is cut short.
    """
    try:
        if file.stat().st_size >= MAX_FILE_BYTES:
            raise ModelError(f"{file} has 2 GB or more, which no ONNX file may have")
        graph = [value for number, value in _fields(file.read_bytes()) if number == _GRAPH]
        if not graph or not isinstance(graph[-1], bytes):
            raise ValueError("no graph in it")
        return _header(list(_fields(graph[-1])))
    except (ValueError, LookupError, OSError) as error:
        raise ModelError(f"{file} is no ONNX model or is cut short: {error}") from error


def _header(graph: list[_Field]) -> OnnxHeader:
    nodes = [_node(_bytes(value)) for number, value in graph if number == _NODE]
    users: dict[str, list[_Node]] = defaultdict(list)
    for node in nodes:
        for name in node.inputs:
            users[name].append(node)
    tensors, kinds, ops_on = [], {}, {}
    for number, value in graph:
        if number == _INITIALIZER:
            name, shape, data_type = _tensor(_bytes(value))
            ops = _ops_behind(name, users)
            size = -(-math.prod(shape) * _BITS.get(data_type, 8) // 8)
            is_looked_up = bool(ops) and ops <= _TABLE_OPS
            tensors.append(OnnxTensor(name, shape, size, is_looked_up))
            kinds[name], ops_on[name] = data_type, ops
    quantized = [node for node in nodes if node.op == "MatMulNBits"]
    blocks = [
        (n.numbers.get("K", 0) * n.numbers.get("N", 0), n.numbers.get("bits", 4)) for n in quantized
    ]
    floats = [
        (math.prod(t.shape), kinds[t.name])
        for t in tensors
        if len(t.shape) > 1 and kinds[t.name] in _FLOATS and ops_on[t.name] & _MATRIX_OPS
    ]
    formats: Counter[str] = Counter()
    for size, bits in blocks:
        formats[_GRIDS.get(bits, f"INT{bits}")] += size
    for size, kind in floats:
        formats[_FLOATS[kind]] += size
    return OnnxHeader(
        tensors=tuple(tensors),
        matrix_sizes=tuple(size for size, _ in (*blocks, *floats)),
        has_own_embedding=any(
            len(t.shape) > 1 and ops_on[t.name] and ops_on[t.name] <= _EMBEDDING_OPS
            for t in tensors
        ),
        format=formats.most_common(1)[0][0] if formats else "F32",
        cache_value_bytes=_cache_value_bytes(graph),
    )


def _ops_behind(name: str, users: dict[str, list[_Node]]) -> set[str]:
    """Return the operators that work on ``name``, behind those that only hand it on.

    Every name is looked at once: paths through a hostile graph can be too many to walk.
    """
    ops: set[str] = set()
    seen, layer = {name}, [name]
    for depth in range(_MAX_DEPTH + 1):
        reached: list[str] = []
        for source in layer:
            for node in users[source]:
                # The first input is what is handed on; others are shapes and axes.
                is_passed = node.op in _PASSING_OPS and node.inputs[0] == source
                if is_passed and depth < _MAX_DEPTH:
                    reached += node.outputs
                else:
                    ops.add(node.op)
        layer = [output for output in dict.fromkeys(reached) if output not in seen]
        seen.update(layer)
    return ops


def _cache_value_bytes(graph: list[_Field]) -> int:
    for number, value in graph:
        if number == _INPUT:
            fields = dict(_fields(_bytes(value)))
            if _bytes(fields.get(1, b"")).decode().startswith(_PAST):
                tensor_type = dict(_fields(_bytes(dict(_fields(_bytes(fields[2])))[1])))
                kind = tensor_type.get(1)
                return _BITS.get(kind, 32) // 8 if isinstance(kind, int) else 4
    return 4


def _node(message: bytes) -> _Node:
    inputs, outputs, op, numbers = [], [], "", {}
    for number, value in _fields(message):
        if number == _NODE_INPUT:
            inputs.append(_bytes(value).decode())
        elif number == _NODE_OUTPUT:
            outputs.append(_bytes(value).decode())
        elif number == _OP_TYPE:
            op = _bytes(value).decode()
        elif number == _ATTRIBUTE:
            fields = dict(_fields(_bytes(value)))
            if isinstance(found := fields.get(_ATTRIBUTE_INT), int):
                numbers[_bytes(fields[_ATTRIBUTE_NAME]).decode()] = found
    return _Node(op, tuple(inputs), tuple(outputs), numbers)


def _tensor(message: bytes) -> tuple[str, tuple[int, ...], int]:
    name, data_type = "", 0
    shape: list[int] = []
    for number, value in _fields(message):
        if number == _DIMS:
            sizes = [value] if isinstance(value, int) else Wire(value).numbers(0, len(value))
            shape += islice(sizes, 1 + _MAX_DIMS)
        elif number == _DATA_TYPE and isinstance(value, int):
            data_type = value
        elif number == _TENSOR_NAME:
            name = _bytes(value).decode()
        if len(shape) > _MAX_DIMS:
            raise ValueError(f"a tensor of more than {_MAX_DIMS} dimensions")
    return name, tuple(shape), data_type


def _fields(message: bytes) -> Iterator[_Field]:
    """Yield number and value of every field: a whole number, or the bytes it holds."""
    for number, wire, start, end in Wire(message).fields():
        yield number, start if wire == VARINT else message[start:end]


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where text or a message belongs")
    return value
