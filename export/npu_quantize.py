"""Graphs of fixed shapes with activations of 16 bits: whole numbers between calibrated ends.

A value is rounded to unsigned 16-bit integers where it is made (``QuantizeLinear``) and read back
from them where it is used (``DequantizeLinear``), one scale and zero point for a tensor: from such
pairs QNN knows what to calculate in integers. Matrices keep the blocks of the GGUF file. The KV
cache is stored as these integers, so it takes the memory that fp16 takes.

Trained models have a few values thousands of times larger than the rest, in the stream between
layers above all (Sun et al. 2024, arXiv:2402.17762). Equal steps up to those would round everything
else away, and to cut them off breaks the model: such values stay floats, which QNN runs in fp16.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

_LAST_CODE = 65_535
# They move values without changing them: what goes in and what comes out is rounded alike.
_MOVING = ("Reshape", "Transpose", "Identity", "Concat")
_CACHE = ("past_key_values.", "new_key_values.")
_WITH_CONSTANTS = ("Add", "Mul", "Div", "RMSNormalization")
_COARSE = 1 / 128
"""Of the mean magnitude: with larger steps fp16, whose steps grow with the number, is finer."""
_FAR_NATS = 20.0
"""How far below all that is seen a hidden slot is: 2e-6 of the weight among 1,000 of them."""


@dataclass(frozen=True)
class Range:
    """What the elements of a value were on the calibration text."""

    low: float
    high: float
    mean_magnitude: float
    """Mean of their absolute values."""

    def joined(self, other: "Range") -> "Range":
        """Return what covers both."""
        return Range(
            min(self.low, other.low),
            max(self.high, other.high),
            max(self.mean_magnitude, other.mean_magnitude),
        )

    def times(self, factor: float) -> "Range":
        """Return ends ``factor`` times as far; the elements are what they were."""
        return replace(self, low=self.low * factor, high=self.high * factor)


@dataclass(frozen=True)
class Rounding:
    """How a value is stored: ``(code - zero_point) * scale``."""

    scale: np.float32
    zero_point: np.uint16 | np.int16


def rounding_for(seen: Range) -> Rounding:
    """Return the finest rounding that reaches both ends of ``seen``, and that 0 is a code of."""
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    scale = np.float32((high - low) / _LAST_CODE) or np.float32(1)
    return Rounding(scale, np.uint16(np.clip(round(-low / float(scale)), 0, _LAST_CODE)))


def signed_rounding_for(seen: Range) -> Rounding:
    """Return a rounding to signed integers that reaches both ends of ``seen``, where 0 is code 0.

    Keys and values need it: a second factor of unsigned integers is rounded to 8 bits by QNN. And
    an empty cache can be filled with zeros without knowing its scale.
    """
    reach = max(-seen.low, seen.high)
    return Rounding(np.float32(reach / np.iinfo(np.int16).max) or np.float32(1), np.int16(0))


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
    scores = (seen.high - seen.low for name, seen in ranges.items() if name.endswith(".scores"))
    return -float(np.ceil(max(scores) + _FAR_NATS))


def quantize_graph(path: Path, ranges: dict[str, Range], hidden: float) -> int:
    """Rewrite the float graph at ``path`` with activations of 16 bits between ``ranges``.

    ``hidden`` is what its masks add to slots that are not seen. Returns how many values, of those
    that depend on inputs, stay floats.
    """
    model = onnx.load(str(path), load_external_data=False)
    own = {name: ranges[name] for name in activations(model)}  # other parts have other values
    roundings = _roundings(model, _with_known(model, own, hidden))
    n_values, n_rounded = len(own), len(roundings)
    _Rounded(model, path.parent, roundings).rewrite()
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path))
    return n_values - n_rounded


def _with_known(
    model: onnx.ModelProto, ranges: dict[str, Range], hidden: float
) -> dict[str, Range]:
    """Return ``ranges`` for masks that add ``hidden``, and for weights that add up to 1."""
    changed = dict(ranges)
    for node in model.graph.node:
        if node.op_type == "Add" and node.input[1].endswith("mask"):
            scores = ranges[node.input[0]]
            changed[node.input[1]] = Range(hidden, 0.0, -hidden)
            changed[node.output[0]] = replace(scores, low=scores.low + hidden)
        elif node.op_type == "Softmax":  # small weights are many: only their sum counts
            changed[node.output[0]] = Range(0.0, 1.0, 1.0)
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
    for name, seen in ranges.items():
        first = first_of(name)
        joined[first] = seen.joined(joined.get(first, seen))
    fine = {first: rounding_for(seen) for first, seen in joined.items() if not _is_coarse(seen)}
    for first in {first_of(name) for name in ranges if name.startswith(_CACHE)}.intersection(fine):
        fine[first] = signed_rounding_for(joined[first])
    return {name: fine[first_of(name)] for name in ranges if first_of(name) in fine}


def _is_coarse(seen: Range) -> bool:
    """Whether a step is large beside most elements; zeros alone have no steps."""
    return float(rounding_for(seen).scale) > _COARSE * seen.mean_magnitude > 0


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
        codes = name = entry.name
        if name not in self._roundings:
            return
        if name.startswith(_CACHE):
            entry.type.tensor_type.elem_type = TensorProto.INT16
        else:
            codes = self._quantize(name, f"{name}.codes", name)
        self._read_as[name] = self._dequantize(codes, f"{name}.read", name)

    def _round_node(self, node: NodeProto, outputs: dict[str, onnx.ValueInfoProto]) -> None:
        rounded = NodeProto()
        rounded.CopyFrom(node)
        is_whole = self._is_whole(node)
        for index, name in enumerate(node.input):
            if is_whole and name in self._tensors:
                rounded.input[index] = self._constant(name)
            else:
                rounded.input[index] = self._read_as.get(name, name)
        self._nodes.append(rounded)
        for index, name in enumerate(node.output):
            if name not in self._roundings:
                continue
            rounded.output[index] = f"{name}.exact"
            entry = outputs.get(name)
            is_cache = name.startswith(_CACHE)
            if entry is not None and is_cache:
                entry.type.tensor_type.elem_type = TensorProto.INT16
            codes = self._quantize(f"{name}.exact", name if is_cache else f"{name}.codes", name)
            read = name if entry is not None and not is_cache else f"{name}.read"
            self._read_as[name] = self._dequantize(codes, read, name)

    def _is_whole(self, node: NodeProto) -> bool:
        """Whether ``node`` reads and makes integers alone, so that its constants must be too."""
        changing = [name for name in (*node.input, *node.output) if name not in self._tensors]
        return node.op_type in _WITH_CONSTANTS and all(name in self._roundings for name in changing)

    def _constant(self, name: str) -> str:
        """Return ``name``, whose values are known, read from codes of its own."""
        if name not in self._read_as:
            values = numpy_helper.to_array(self._tensors[name], str(self._folder))
            ends = float(values.min()), float(values.max())
            rounding = rounding_for(Range(*ends, mean_magnitude=float(np.abs(values).mean())))
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
            helper.make_node(
                op_type, [value, scale, zero_point], [output], name=f"{output}.{op_type}"
            )
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


def codes_of(
    values: NDArray[np.float32], rounding: Rounding
) -> NDArray[np.uint16] | NDArray[np.int16]:
    """Return the codes that ``values`` round to, as ``QuantizeLinear`` does."""
    codes = np.rint(values / rounding.scale) + int(rounding.zero_point)
    kind = rounding.zero_point.dtype
    kept: NDArray[np.uint16] | NDArray[np.int16]
    kept = np.clip(codes, np.iinfo(kind).min, np.iinfo(kind).max).astype(kind)
    return kept
