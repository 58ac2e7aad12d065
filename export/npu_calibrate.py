"""Between which values the activations of a graph of fixed shapes lie, seen on a user's text.

The prompt graph is given two more outputs for every value in it, its least and its largest, and
runs on the CPU over the text, piece by piece with the cache filling as it does in use. Both graphs
call their values alike, so what is seen in one holds for the other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgekd.errors import DataError
from edgekd.export.npu_quantize import Range, activations
from edgekd.runtime.npu_engine import NpuEngine

_ENDS = {"least": "ReduceMin", "largest": "ReduceMax"}


def measure_ranges(folder: Path, ids: Sequence[int], n_threads: int) -> dict[str, Range]:
    """Return the range of every activation in the float graphs in ``folder`` over ``ids``.

    Only whole pieces are run, since padding has values that no text has.

    Raises:
        DataError: the text is shorter than a piece, or drives a value to infinity.
    """
    prefill = folder / "prefill.onnx"
    plain = prefill.read_bytes()
    try:
        watched = _watched(onnx.load_from_string(plain))
        prefill.write_bytes(watched.SerializeToString())
        engine = _WatchedEngine(folder, n_threads)
        _run(engine, ids)
        engine.close()
    finally:
        prefill.write_bytes(plain)
    broken = [name for name, ends in engine.ranges.items() if not np.isfinite(ends).all()]
    if broken:
        raise DataError(f"the text drives {broken[0]} to infinity or NaN; the model is damaged")
    return engine.ranges


class _WatchedEngine(NpuEngine):
    """Keeps the least and the largest that every value was."""

    def __init__(self, folder: Path, n_threads: int) -> None:
        super().__init__(folder, np.iinfo(np.int64).max, n_threads, "cpu")
        self.prefill_tokens = self._model.prefill_tokens
        self.ranges: dict[str, Range] = {}

    def run_graph(self, graph: str, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = super().run_graph(graph, inputs)
        for name in [name for name in outputs if name.endswith(":least")]:
            value = name.removesuffix(":least")
            low, high = float(outputs[name]), float(outputs[f"{value}:largest"])
            before = self.ranges.get(value, (low, high))
            # min() and max() would lose a NaN that is not their first argument.
            self.ranges[value] = (
                float(np.minimum(before[0], low)),
                float(np.maximum(before[1], high)),
            )
        return outputs


def _run(engine: _WatchedEngine, ids: Sequence[int]) -> None:
    size = engine.prefill_tokens
    if len(ids) < size:
        raise DataError(
            f"the calibration text is {len(ids)} tokens long; give at least the {size} of --prefill"
        )
    for start in range(0, len(ids) - size + 1, size):
        if engine.position + size > engine.context_tokens:
            engine.rewind()
        engine.forward(ids[start : start + size])


def _watched(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return ``model`` with both ends of every activation as outputs."""
    graph = model.graph
    for value in activations(model):
        for end, op_type in _ENDS.items():
            name = f"{value}:{end}"
            graph.node.append(helper.make_node(op_type, [value], [name], name=name, keepdims=0))
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
    return model
