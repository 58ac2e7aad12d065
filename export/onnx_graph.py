"""A small builder of ONNX graphs whose weights go straight into external data files."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgekd.export.onnx_weights import WeightFiles

_MICROSOFT = "com.microsoft"
ROWS_KEY = "edgekd.rows"
"""Metadata of the model: for every matrix of several, checkpoint names and rows of its parts."""
FloatType = type[np.float32] | type[np.float16]


class GraphBuilder:
    """Collects nodes; every method that adds one returns its output's name."""

    def __init__(self, weights: WeightFiles, floats: FloatType = np.float32) -> None:
        """Keep weights in ``weights``; ``floats`` is what the graph calculates in."""
        self.floats = floats
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[TensorProto] = []
        self._known: set[str] = set()
        self._metadata: dict[str, str] = {}

    def add_input(self, name: str, element_type: int, shape: list[str | int]) -> str:
        """Declare a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, element_type, shape))
        return name

    def add_optional_input(self, name: str, default: NDArray[Any]) -> str:
        """Declare a graph input that runtimes may leave out, with what it then is."""
        element_type = helper.np_dtype_to_tensor_dtype(default.dtype)
        self.add_input(name, element_type, list(default.shape))
        return self.constant(name, default)

    def add_output(self, name: str, element_type: int, shape: list[str | int]) -> None:
        """Declare a graph output; some node must produce ``name``."""
        self._outputs.append(helper.make_tensor_value_info(name, element_type, shape))

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """Store ``array`` in a data file, once per ``name``."""
        if name not in self._known:
            self._initializers.append(self._weights.store(name, array))
            self._known.add(name)
        return name

    def float_weight(self, name: str, array: NDArray[Any]) -> str:
        """Store ``array`` as the type that the graph calculates in."""
        return self.weight(name, array.astype(self.floats, copy=False))

    def as_floats(self, value: str, stored: FloatType) -> str:
        """Return ``value``, which is of type ``stored``, as what the graph calculates in."""
        if stored == self.floats:
            return value
        converted = f"{value}.converted"
        return converted if self.has(converted) else self._cast(value, converted)

    @property
    def float_type(self) -> int:
        """What the graph calculates in, as ONNX numbers it."""
        return helper.np_dtype_to_tensor_dtype(np.dtype(self.floats))

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """Store a small ``array`` in the model file itself, once per ``name``."""
        if name not in self._known:
            self._initializers.append(onnx.numpy_helper.from_array(array, name))
            self._known.add(name)
        return name

    def add_metadata(self, key: str, value: str) -> None:
        """Add a text to the model file that no runtime interprets."""
        self._metadata[key] = value

    def has(self, name: str) -> bool:
        """Return whether a value called ``name`` was made already."""
        return name in self._known

    def node(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add an operator of the ONNX standard with one output."""
        return self._add(op_type, inputs, [output], "", attributes)[0]

    def split(self, value: str, sizes: str, outputs: list[str]) -> list[str]:
        """Cut ``value`` along its last axis."""
        return self._add("Split", [value, sizes], outputs, "", {"axis": -1})

    def microsoft_node(
        self, op_type: str, inputs: list[str], outputs: list[str], **attributes: Any
    ) -> list[str]:
        """Add an operator of ONNX Runtime's own domain."""
        return self._add(op_type, inputs, outputs, _MICROSOFT, attributes)

    def save(self, model_path: Path, name: str, opset: int) -> None:
        """Check the graph and write it to ``model_path``."""
        self._weights.flush()
        graph = helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, self._initializers
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(_MICROSOFT, 1)],
            producer_name="edgekd",
            ir_version=11,
        )
        helper.set_model_props(model, self._metadata)
        model_path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(model_path))

    def _cast(self, value: str, output: str) -> str:
        return self.node("Cast", [value], output, to=self.float_type)

    def _add(
        self,
        op_type: str,
        inputs: list[str],
        outputs: list[str],
        domain: str,
        attributes: dict[str, Any],
    ) -> list[str]:
        node = helper.make_node(
            op_type, inputs, outputs, name=outputs[0], domain=domain, **attributes
        )
        self._nodes.append(node)
        self._known.update(outputs)
        return outputs
