"""Whether an ONNX file can be handed to native code: looked through whole, in Python.

Counts and lengths lie within the file, nesting is bounded, element types are known, stored values
are as long as type and shape say, and files beside it that it names lie in its folder. Graphs in
attributes (bodies of If and Loop), functions and sparse tensors are looked at too. No weights are
read, and what operators do with them is ONNX Runtime's to check.

    check_onnx(Path("model/model.onnx"))    # returns, or raises a ModelError
"""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edgekd.errors import ModelError
from edgekd.runtime.onnx_external import ExternalFiles
from edgekd.runtime.onnx_tensor import ELEMENT_TYPES, StoredTensor, check_values, read_tensor
from edgekd.runtime.protobuf_wire import BYTES, VARINT, Wire, WireError

MAX_FILE_BYTES = 2**31
"""Protobuf's own limit, which no ONNX file reaches."""
_SUFFIX = ".onnx"
_MAX_DEPTH = 60  # of messages, three to a graph in a graph; protobuf stops at 100

# Message -> field -> message in it. What is not named holds nothing that lengths depend on.
_INSIDE: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute", 12: "ValueInfo"},
    "Graph": {1: "Node", 5: "Tensor", 11: "ValueInfo", 12: "ValueInfo", 13: "ValueInfo"}
    | {15: "SparseTensor"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 14: "Type", 15: "Type"}
    | {22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "ValueInfo": {2: "Type"},
    "Type": {1: "ElementType", 4: "Items", 5: "Map", 8: "ElementType", 9: "Items"},
    "Items": {1: "Type"},
    "Map": {2: "Type"},
}
# Fields that occur once: of two of them parsers take the last, or both as one.
_ONCE: dict[str, set[int]] = {
    "Model": {7},
    "TrainingInfo": {1, 2},
    "Attribute": {5, 6, 14, 22},
    "SparseTensor": {1, 2},
    "ValueInfo": {2},
    "Type": {1, 4, 5, 8, 9},
    "Items": {1},
    "Map": {2},
}
_GRAPH = 7
_NODE_OP, _NODE_ATTRIBUTE = 4, 5
_ELEMENT_TYPE = 1
_SPARSE_VALUES, _SPARSE_INDICES = 1, 2
_NAME, _NUMBER, _TEXT, _ARGUMENT = 1, 3, 4, 21
_ATTRIBUTE_WIRES = {_NAME: BYTES, _NUMBER: VARINT, _TEXT: BYTES, _ARGUMENT: BYTES}
_CONTEXT_OP = b"EPContext"
_CONTEXT_FILES = ("ep_cache_context", "onnx_model_filename")
"""Attributes that name files; the first holds the content instead where ``embed_mode`` is 1."""


def check_onnx(path: Path) -> None:
    """Return only if the ONNX file at ``path`` is sound, as are the places of what it names.

    Raises:
        ModelError: it is not, or no file.
    """
    try:
        if path.suffix != _SUFFIX:  # ONNX Runtime takes others for models in a form of its own
            raise ValueError(f"its name does not end in {_SUFFIX}")
        if not path.is_file():
            raise ModelError(f"no model at {path}; fetch it again or export it again")
        size_bytes = path.stat().st_size
        if not 0 < size_bytes < MAX_FILE_BYTES:
            raise WireError(f"it has {size_bytes} bytes; allowed are 1 to {MAX_FILE_BYTES - 1}")
        with path.open("rb") as file, _mapped(file.fileno()) as data:
            _Check(path, Wire(data)).run()
    except WireError as error:
        raise ModelError(
            f"{path} is no ONNX model or is cut short: {error}; fetch it again"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path} is refused: {error}; fetch or export it again") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error


def _mapped(descriptor: int) -> mmap.mmap:
    """Return the file without reading it: weights may lie in it."""
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)


class _Attribute(NamedTuple):
    """What an ``EPContext`` node is told."""

    name: str
    number: int
    text: tuple[int, int]
    """Where it starts and ends."""
    is_argument: bool
    """Whether the value is that of another node's attribute."""


class _Check:
    """One walk through a model."""

    def __init__(self, path: Path, wire: Wire) -> None:
        self._wire = wire
        self._files = ExternalFiles(path)
        self._looks: dict[str, Callable[[int, int, int], object]] = {
            "Tensor": self._tensor,
            "SparseTensor": self._sparse_tensor,
            "Node": self._node,
            "ElementType": self._element_type,
        }

    def run(self) -> None:
        if _GRAPH not in self._message("Model", 0, len(self._wire.data), 0):
            raise WireError("no graph in it")
        self._files.check_overlaps()

    def _message(self, kind: str, start: int, end: int, depth: int) -> set[int]:
        """Look at a message of ``kind`` and all in it; return the fields that hold messages."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"its messages are nested more than {_MAX_DEPTH} deep")
        inside, once = _INSIDE[kind], _ONCE.get(kind, set())
        given: set[int] = set()
        for number, wire, place, stop in self._wire.fields(start, end):
            if number not in inside:
                continue
            if wire != BYTES or (number in given and number in once):
                raise ValueError(f"field {number} of a {kind} is given twice or no message")
            given.add(number)
            self._inner(inside[number], place, stop, depth + 1)
        return given

    def _inner(self, kind: str, start: int, end: int, depth: int) -> None:
        if kind in self._looks:
            self._looks[kind](start, end, depth)
        else:
            self._message(kind, start, end, depth)

    def _tensor(self, start: int, end: int, depth: int) -> StoredTensor:
        tensor = read_tensor(self._wire, start, end)
        check_values(tensor)
        if tensor.is_external:
            self._files.take(tensor)
        return tensor

    def _sparse_tensor(self, start: int, end: int, depth: int) -> None:
        self._message("SparseTensor", start, end, depth)
        found: dict[int, list[int]] = {_SPARSE_VALUES: [], _SPARSE_INDICES: []}
        for number, _, place, stop in self._wire.fields(start, end):
            if number in found:
                found[number] = read_tensor(self._wire, place, stop).shape
        values, indices = found.values()
        if len(values) != 1 or indices[:1] != values:
            raise ValueError(f"a sparse tensor has values {values} and indices {indices}")

    def _node(self, start: int, end: int, depth: int) -> None:
        ops, attributes = [], []
        for number, wire, place, stop in self._wire.fields(start, end):
            if number in (_NODE_OP, _NODE_ATTRIBUTE) and wire != BYTES:
                raise ValueError(f"field {number} of a Node is a number")
            if number == _NODE_OP:
                ops.append(self._wire.data[place:stop])
            elif number == _NODE_ATTRIBUTE:
                attributes.append((place, stop))
                self._message("Attribute", place, stop, depth + 1)
        if len(ops) > 1:
            raise ValueError("a node has two operators")
        if ops == [_CONTEXT_OP]:
            self._context([self._attribute(*span) for span in attributes])

    def _context(self, attributes: list[_Attribute]) -> None:
        """Look at a node that holds a graph compiled for a processor, or names its file."""
        named = {attribute.name: attribute for attribute in attributes}
        if len(named) < len(attributes) or any(each.is_argument for each in attributes):
            raise ValueError("an EPContext node has an attribute twice, or one of a function")
        embedded = named["embed_mode"].number if "embed_mode" in named else 1
        if embedded not in (0, 1):
            raise ValueError(
                f"an EPContext node has the embed_mode {embedded}; allowed are 0 and 1"
            )
        for name in _CONTEXT_FILES[embedded:]:
            location = self._wire.text(*named[name].text) if name in named else ""
            if location:
                self._files.open_beside(f"{name} of an EPContext node", location)

    def _attribute(self, start: int, end: int) -> _Attribute:
        found: dict[int, tuple[int, int]] = {}
        for number, wire, place, stop in self._wire.fields(start, end):
            if number not in _ATTRIBUTE_WIRES:
                continue
            if number in found or wire != _ATTRIBUTE_WIRES[number]:
                raise ValueError(f"field {number} of an Attribute is given twice or no such value")
            found[number] = (place, stop)
        name, text = found.get(_NAME, (0, 0)), found.get(_TEXT, (0, 0))
        number, _ = found.get(_NUMBER, (0, 0))
        return _Attribute(self._wire.text(*name), number, text, _ARGUMENT in found)

    def _element_type(self, start: int, end: int, depth: int) -> None:
        for number, wire, value, _ in self._wire.fields(start, end):
            # Zero stands for one that is not known.
            if number == _ELEMENT_TYPE and (
                wire != VARINT or (value and value not in ELEMENT_TYPES)
            ):
                raise ValueError(f"a value is of the unknown element type {value}")
