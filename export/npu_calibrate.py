"""Between which values the activations of a graph of fixed shapes lie, seen on a user's text.

The prompt graph, in however many parts, is given two more outputs for every value in it, its least
and its largest, and runs on the CPU over the text, piece by piece with the cache filling as it does
in use. Both graphs call their values alike, so what is seen in one holds for the other; what a part
hands on is called alike in both, too.
"""

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgekd.errors import DataError
from edgekd.export.npu_quantize import Range, activations
from edgekd.runtime.npu_engine import NpuEngine
from edgekd.runtime.static_model import read_static

_MARGIN = 2.0
"""Largest values of texts differ by so much, and what lies beyond a range is cut off."""
_LEAST, _LARGEST, _MAGNITUDE = ":least", ":largest", ":magnitude"


def measure_ranges(
    folder: Path, ids: Sequence[int], first_id: int | None, n_threads: int
) -> dict[str, Range]:
    """Return the range of every activation in the float graphs in ``folder`` over ``ids``.

    ``first_id`` is the token that chats begin with. Only whole pieces are run, since padding has
    values that no text has. The ranges are wider than what was seen, by a bit of the sixteen.

    Raises:
        DataError: the text is shorter than a piece, or drives a value to infinity.
    """
    files = [folder / f"{part}.onnx" for part in read_static(folder).parts("prefill")]
    plain = {file: file.read_bytes() for file in files}
    try:
        for file, content in plain.items():
            file.write_bytes(_watched(onnx.load_from_string(content)).SerializeToString())
        engine = _WatchedEngine(folder, n_threads)
        engine.watch(ids, first_id)
        engine.close()
    finally:
        for file, content in plain.items():
            file.write_bytes(content)
    broken = [name for name, seen in engine.ranges.items() if not np.isfinite(astuple(seen)).all()]
    if broken:
        raise DataError(f"the text drives {broken[0]} to infinity or NaN; the model is damaged")
    return {name: seen.times(_MARGIN) for name, seen in engine.ranges.items()}


class _WatchedEngine(NpuEngine):
    """Keeps the least and the largest that every value was."""

    def __init__(self, folder: Path, n_threads: int) -> None:
        super().__init__(folder, np.iinfo(np.int64).max, n_threads, "cpu")
        self.ranges: dict[str, Range] = {}
        self._share = 1.0

    def watch(self, ids: Sequence[int], first_id: int | None) -> None:
        """Run every whole piece of ``ids`` as a start, then all of them one after the other.

        First tokens are where a model's largest values are, so a text's one start would tell little
        about them; every other one is ``first_id``, which chats begin with.
        """
        size = self._model.prefill_tokens
        n_pieces = len(ids) // size
        if not n_pieces:
            raise DataError(
                f"the calibration text is {len(ids)} tokens long; give at least the {size} of "
                "--prefill"
            )
        self._share = 1 / (2 * n_pieces)
        pieces = [list(ids[start : start + size]) for start in range(0, n_pieces * size, size)]
        for number, piece in enumerate(pieces):
            self.rewind()
            is_chat = number % 2 == 0
            self.forward(piece if first_id is None or not is_chat else [first_id, *piece[1:]])
        self.rewind()
        for piece in pieces:
            if self.position + size > self.context_tokens:
                self.rewind()
            self.forward(piece)

    def run_graph(self, graph: str, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = super().run_graph(graph, inputs)
        for name in [name for name in outputs if name.endswith(_LEAST)]:
            value = name.removesuffix(_LEAST)
            ends = (float(outputs[f"{value}{kind}"]) for kind in (_LEAST, _LARGEST, _MAGNITUDE))
            self._see(value, *ends)
        return outputs

    def _see(self, value: str, low: float, high: float, magnitude: float) -> None:
        """Widen what is known of ``value``; NaN stays NaN, which min() and max() may lose."""
        before = self.ranges.get(value, Range(low, high, 0.0))
        self.ranges[value] = Range(
            float(np.minimum(before.low, low)),
            float(np.maximum(before.high, high)),
            before.mean_magnitude + magnitude * self._share,
        )


def _watched(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return ``model`` with both ends of every activation as outputs."""
    graph = model.graph
    for value in activations(model):
        absolute = f"{value}:absolute"
        graph.node.append(helper.make_node("Abs", [value], [absolute], name=absolute))
        for kind, op_type, source in (
            (_LEAST, "ReduceMin", value),
            (_LARGEST, "ReduceMax", value),
            (_MAGNITUDE, "ReduceMean", absolute),
        ):
            name = f"{value}{kind}"
            graph.node.append(helper.make_node(op_type, [source], [name], name=name, keepdims=0))
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
    return model
