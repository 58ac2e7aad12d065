"""Small ONNX files for the tests of what is looked at before native code opens one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper

WEIGHTS = "weights.bin"
WEIGHTS_BYTES = 64


def stored(name: str = "w", shape: Sequence[int] = (2, 2)) -> TensorProto:
    """Return a tensor of zeros whose values lie in the model."""
    n_values = 1
    for size in shape:
        n_values *= size
    return helper.make_tensor(name, TensorProto.FLOAT, shape, bytes(4 * n_values), raw=True)


def outside(
    name: str = "w", offset: int = 0, n_values: int = 4, location: str = WEIGHTS, **changes: str
) -> TensorProto:
    """Return a tensor of floats whose values lie in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[n_values])
    tensor.data_location = TensorProto.EXTERNAL
    named = {"location": location, "offset": str(offset), "length": str(4 * n_values)} | changes
    for key, value in named.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(tensors: Sequence[Any] = (), nodes: Sequence[NodeProto] = (), **more: Any) -> ModelProto:
    """Return a model that adds up what is stored first and its input."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])
    add = helper.make_node("Add", ["x", "w"], ["y"])
    graph = helper.make_graph([*nodes, add], "g", [value], [result], list(tensors), **more)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def save(folder: Path, content: ModelProto | bytes, weights_bytes: int = WEIGHTS_BYTES) -> Path:
    """Write ``content`` and a file of weights beside it into ``folder``; return where it is."""
    path = folder / "model.onnx"
    folder.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    (folder / WEIGHTS).write_bytes(bytes(weights_bytes))
    return path


def branch(tensors: Sequence[Any] = (), nodes: Sequence[NodeProto] = ()) -> NodeProto:
    """Return an ``If`` that has ``tensors`` and ``nodes`` in both of its bodies."""
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 2])
    graph = helper.make_graph(nodes, "body", [], [value], list(tensors))
    return helper.make_node("If", ["c"], ["z"], then_branch=graph, else_branch=graph)


def context(**attributes: Any) -> NodeProto:
    """Return a node that holds a compiled graph, or names the file that does."""
    return helper.make_node("EPContext", ["x"], ["w"], domain="com.microsoft", **attributes)


def argument(name: str) -> AttributeProto:
    """Return an attribute whose value is that of the node which calls a function."""
    return AttributeProto(name=name, ref_attr_name="a", type=AttributeProto.STRING)


def part(number: int, content: bytes) -> bytes:
    """Return a field that holds ``content``, as protobuf writes it."""
    length, digits = len(content), b""
    while length >= 0x80:
        digits += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + digits + bytes([length]) + content


def with_tensor(content: bytes) -> bytes:
    """Return a model whose only tensor is ``content``, as it is written."""
    return part(7, part(5, content))
