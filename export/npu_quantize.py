"""Graphs of fixed shapes with activations of 16 bits: whole numbers between calibrated ends.

Every value is rounded to unsigned 16-bit integers where it is made (``QuantizeLinear``) and read
back from them where it is used (``DequantizeLinear``), one scale and zero point for a tensor:
from such pairs QNN knows in which integers to calculate. Matrices keep the blocks of the GGUF file.
The KV cache is stored as these integers, so it takes the memory that fp16 takes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

Range = tuple[float, float]
"""The least and the largest that a value was."""

_LAST_CODE = 65_535
# They move values without changing them: what goes in and what comes out is rounded alike.
_MOVING = ("Reshape", "Transpose", "Identity", "Split", "Concat")
_CACHE = ("past_key_values.", "new_key_values.")
_WITH_CONSTANTS = ("Add", "Mul", "Div", "RMSNormalization")
_FAR_NATS = 20.0
"""How far below all that is seen a hidden slot is: 2e-6 of the weight among 1,000 of them."""


@dataclass(frozen=True)
class Rounding:
    """How a value is stored: ``(code - zero_point) * scale``."""

    scale: np.float32
    zero_point: np.uint16


def rounding_for(ends: Range) -> Rounding:
    """Return the finest rounding that reaches both ``ends``, and that 0 is a code of."""
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    scale = np.float32((high - low) / _LAST_CODE) or np.float32(1)
    return Rounding(scale, np.uint16(np.clip(round(-low / float(scale)), 0, _LAST_CODE)))


def activations(model: onnx.ModelProto) -> list[str]:
    """Return the float values of ``model`` that depend on its inputs, in the order they are made.

    Everything that nodes make of inputs is float here, and everything else comes from weights.
    """
    known = [entry.name for entry in model.graph.input]
    changing = set(known)
    for node in model.graph.node:
        if changing.intersection(node.input):
            known += node.output
            changing.update(node.output)
    return known


def hidden_score(ranges: dict[str, Range]) -> float:
    """Return what a mask adds to slots that a token must not see: far, but no farther than needed.

    Masked scores share 65,536 steps with what hides them, so the -30,000 of floats would leave none
    to the scores.
    """
    scores = (high - low for name, (low, high) in ranges.items() if name.endswith(".scores"))
    return -float(np.ceil(max(scores) + _FAR_NATS))


def quantize_graph(path: Path, ranges: dict[str, Range], hidden: float) -> None:
    """Rewrite the float graph at ``path`` with activations of 16 bits between ``ranges``.

    ``hidden`` is what its masks add to slots that are not seen.
    """
    model = onnx.load(str(path), load_external_data=False)
    roundings = _roundings(model, _with_masks(model, ranges, hidden))
    _Rounded(model, path.parent, roundings).rewrite()
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path))


def _with_masks(
    model: onnx.ModelProto, ranges: dict[str, Range], hidden: float
) -> dict[str, Range]:
    """Return ``ranges`` for masks that add ``hidden``, not what calibration ran with."""
    changed = dict(ranges)
    for node in model.graph.node:
        if node.op_type == "Add" and node.input[1].endswith("mask"):
            low, high = ranges[node.input[0]]
            changed[node.input[1]] = (hidden, 0.0)
            changed[node.output[0]] = (low + hidden, high)
    return changed


def _roundings(model: onnx.ModelProto, ranges: dict[str, Range]) -> dict[str, Rounding]:
    """Return how each value is rounded; values that are only moved share one rounding."""
    group = {name: name for name in ranges}

    def first_of(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for node in model.graph.node:
        if node.op_type in _MOVING:
            moved = [name for name in (*node.input, *node.output) if name in ranges]
            for other in moved[1:]:
                group[first_of(other)] = first_of(moved[0])
    joined: dict[str, Range] = {}
    for name, (low, high) in ranges.items():
        before = joined.get(first_of(name), (low, high))
        joined[first_of(name)] = (min(before[0], low), max(before[1], high))
    return {name: rounding_for(joined[first_of(name)]) for name in ranges}


class _Rounded:
    """Puts a pair of nodes behind every value of a graph."""

    def __init__(
        self, model: onnx.ModelProto, folder: Path, roundings: dict[str, Rounding]
    ) -> None:
        self._graph = model.graph
        self._roundings = roundings
        self._folder = folder
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._nodes: list[NodeProto] = []
        self._new: dict[str, TensorProto] = {}
        self._read_as: dict[str, str] = {}

    def rewrite(self) -> None:
        """Round inputs, then what each node makes; drop weights that nothing reads any more."""
        for entry in self._graph.input:
            self._take(entry)
        outputs = {entry.name: entry for entry in self._graph.output}
        for node in self._graph.node:
            self._round_node(node, outputs)
        self._replace_nodes()

    def _take(self, entry: onnx.ValueInfoProto) -> None:
        name = entry.name
        codes = name
        if name.startswith(_CACHE):
            entry.type.tensor_type.elem_type = TensorProto.UINT16
        else:
            codes = self._quantize(name, f"{name}.codes", name)
        self._read_as[name] = self._dequantize(codes, f"{name}.read", name)

    def _round_node(self, node: NodeProto, outputs: dict[str, onnx.ValueInfoProto]) -> None:
        rounded = NodeProto()
        rounded.CopyFrom(node)
        if not any(name in self._roundings for name in node.output):
            self._nodes.append(rounded)
            return
        for index, name in enumerate(node.input):
            if node.op_type in _WITH_CONSTANTS and name in self._tensors:
                rounded.input[index] = self._constant(name)
            else:
                rounded.input[index] = self._read_as.get(name, name)
        self._nodes.append(rounded)
        for index, name in enumerate(node.output):
            rounded.output[index] = f"{name}.exact"
            entry = outputs.get(name)
            is_cache = name.startswith(_CACHE)
            if entry is not None and is_cache:
                entry.type.tensor_type.elem_type = TensorProto.UINT16
            codes = self._quantize(f"{name}.exact", name if is_cache else f"{name}.codes", name)
            read = name if entry is not None and not is_cache else f"{name}.read"
            self._read_as[name] = self._dequantize(codes, read, name)

    def _constant(self, name: str) -> str:
        """Return ``name``, whose values are known, read from codes of its own."""
        if name not in self._read_as:
            values = numpy_helper.to_array(self._tensors[name], str(self._folder))
            rounding = rounding_for((float(values.min()), float(values.max())))
            self._roundings[name] = rounding
            codes = self._store(f"{name}.codes", codes_of(values, rounding))
            self._read_as[name] = self._dequantize(codes, f"{name}.read", name)
        return self._read_as[name]

    def _quantize(self, value: str, output: str, rounded_as: str) -> str:
        return self._pair_half("QuantizeLinear", value, output, rounded_as)

    def _dequantize(self, codes: str, output: str, rounded_as: str) -> str:
        return self._pair_half("DequantizeLinear", codes, output, rounded_as)

    def _pair_half(self, op_type: str, value: str, output: str, rounded_as: str) -> str:
        rounding = self._roundings[rounded_as]
        scale = self._store(f"{rounded_as}.scale", np.array(rounding.scale))
        zero_point = self._store(f"{rounded_as}.zero_point", np.array(rounding.zero_point))
        self._nodes.append(
            helper.make_node(op_type, [value, scale, zero_point], [output], name=f"{output}.{op_type}")
        )
        return output

    def _store(self, name: str, array: NDArray[Any]) -> str:
        if name not in self._new:
            self._new[name] = numpy_helper.from_array(array, name)
        return name

    def _replace_nodes(self) -> None:
        used = {name for node in self._nodes for name in node.input}
        kept = [tensor for name, tensor in self._tensors.items() if name in used]
        del self._graph.node[:], self._graph.initializer[:]
        self._graph.node.extend(self._nodes)
        self._graph.initializer.extend([*kept, *self._new.values()])


def codes_of(values: NDArray[np.float32], rounding: Rounding) -> NDArray[np.uint16]:
    """Return the codes that ``values`` round to, as ``QuantizeLinear`` does."""
    codes = np.rint(values / rounding.scale) + rounding.zero_point
    return np.clip(codes, 0, _LAST_CODE).astype(np.uint16)
